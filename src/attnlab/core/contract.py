"""The contract of a token mixer: validation and the laws that hold for all stand here, the mechanism in the subclass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import alternatives
from attnlab.core.dynamics import Dynamics
from attnlab.core.errors import UnsupportedError
from attnlab.core.grid import Grid, resolve_grid
from attnlab.core.info import MixerInfo, Supports
from attnlab.core.masks import Masks, answered_queries, check_mask, check_pair_mask, zero_masked
from attnlab.core.record import emit, recording
from attnlab.core.state import Before, State
from attnlab.core.tokens import sequence_lengths


class Mixer(nn.Module):
    """A token mixer: tokens (batch, n, dim) in, tokens of the same shape out.

    A subclass implements `mix`, and `matrix` where it promises a mixing matrix. `forward` validates, refuses what
    ``info.supports`` does not promise, zeroes what stands at masked tokens before anything reads it, and zeroes the output there
    and at queries that the masks leave no key.

    Args:
        dim: width of the tokens.
        num_heads: heads, a divisor of ``dim``.
        causal: output t depends on inputs 0..t alone.

    Raises:
        ValueError: if ``dim`` or ``num_heads`` is not positive, or ``num_heads`` does not divide ``dim``.
        UnsupportedError: if the mechanism has no such causality.
    """

    info: ClassVar[MixerInfo]
    num_prefix: int = 0  # leading tokens that are outside the grid, such as a class token

    def __init__(self, dim: int, num_heads: int = 8, *, causal: bool = False) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        if dim % num_heads:
            divisors = [h for h in range(1, dim + 1) if dim % h == 0]
            raise ValueError(
                f"dim: expected a multiple of num_heads={num_heads}, got {dim}; num_heads could be one of {divisors}"
            )
        if not isinstance(causal, bool):
            raise TypeError(f"causal: expected True or False, got {causal!r}")
        have = self.supports.causal
        if causal and have == "no":
            raise self._refusal("causal=True", "its definition reads the future", causal=True)
        if not causal and have == "always":
            raise self._refusal("causal=False", "it has no other form than the causal one", causal="optional")
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.context_dim = dim  # width that `context` must have

    @property
    def supports(self) -> Supports:
        """The promises of this mixer."""
        return self.info.supports

    @property
    def fixed_tokens(self) -> int | None:
        """How many tokens it was built for, its prefix included, and takes no others; None for any number."""
        option = self.supports.tokens_option
        return None if option is None else getattr(self, option)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None = None,
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        pair_mask: Bool[Tensor, "#b #h n m"] | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Mix the tokens.

        Args:
            x: tokens, (batch, n, dim), n >= 1.
            context: where keys and values come from, (batch, m, context width); None means ``x``.
            mask: (batch, n), True marks a real token; the output is exactly 0 at the others.
            context_mask: (batch, m), the same for ``context``.
            pair_mask: (batch or 1, heads or 1, n, m), True: this query may use this key.
            grid: the sides of ``x``'s grid, row-major, product n; None is a sequence.

        Raises:
            TypeError: for a wrong dtype.
            ValueError: for a wrong shape or device.
            UnsupportedError: for what ``info.supports`` does not promise.
        """
        grid = self._validate(x, context, mask, context_mask, pair_mask, grid)
        x, context = zero_masked(x, mask), None if context is None else zero_masked(context, context_mask)
        masks = Masks(mask, mask if context is None else context_mask, pair_mask)
        y = self.mix_all(x, context, masks, grid)
        # a query without a key gives 0, whatever biases and residual branches would add
        num_keys = (x if context is None else context).shape[1]
        answered = answered_queries(x, num_keys, causal=self.causal, mask=mask, key_mask=masks.key, pair_mask=pair_mask)
        return zero_masked(y, answered)

    def packed(self, x: Float[Tensor, "t c"], cu_seqlens: Int[Tensor, "s"]) -> Float[Tensor, "t c"]:
        """Mix several sequences that lie one behind the other, without padding; no token sees another sequence.

        Args:
            x: tokens of all sequences, (total, dim).
            cu_seqlens: where each begins, and at last the total: 0, n1, n1 + n2, ...; integers.

        Returns:
            What `forward` gives each of them alone, (total, dim).

        Raises:
            TypeError: for a wrong dtype.
            ValueError: for a wrong shape, or lengths that are not positive or do not add up.
            UnsupportedError: if ``info.supports.varlen`` is not promised.
        """
        if not self.supports.varlen:
            raise self._refusal("packed sequences", "it needs whole examples of its own shape", varlen=True)
        if not isinstance(x, Tensor) or x.dim() != 2:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: expected 2 dimensions (total, {self.dim}), got {got}")
        self._check_tokens("x", x[None], self.dim)
        return self.mix_packed(x, sequence_lengths(cu_seqlens, x.shape[0]))

    def mixing_matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None = None,
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "b m"] | None = None,
        pair_mask: Bool[Tensor, "#b #h n m"] | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "b h n m"]:
        """What multiplies the values: row i holds the weights of all keys for query i. Arguments as for `forward`."""
        if not self.supports.mixing_matrix:
            raise self._refusal("mixing_matrix", "no matrix between tokens multiplies its values", mixing_matrix=True)
        grid = self._validate(x, context, mask, context_mask, pair_mask, grid)
        x, context = zero_masked(x, mask), None if context is None else zero_masked(context, context_mask)
        masks = Masks(mask, mask if context is None else context_mask, pair_mask)
        matrix = self.matrix(x, context, masks, grid)
        return matrix if mask is None else matrix.masked_fill(~mask[:, None, :, None], 0.0)

    def init_state(self, batch_size: int) -> State:
        """The state before the first token; streaming mixers override this."""
        raise self._refusal("streaming", "it defines no state", streaming=True)

    def extend(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Process the next n >= 1 tokens; streaming mixers override this."""
        raise self._refusal("streaming", "it defines no state", streaming=True)

    def summarize(
        self, x: Float[Tensor, "b n c"], before: Before | None = None, *, mask: Bool[Tensor, "b n"] | None = None
    ) -> State:
        """What a piece of a sequence does to the state; mixers that promise ``associative`` override this."""
        raise self._refusal("summarize", "what a piece does depends on the state before it", associative=True)

    def combine(self, earlier: State, later: State) -> State:
        """Two summaries as one; mixers that promise ``associative`` override this."""
        raise self._refusal("combine", "what a piece does depends on the state before it", associative=True)

    def dynamics(self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> Dynamics:
        """The mechanism on these tokens as a linear recurrence with matrices that depend on them.

        Args:
            x: tokens, (batch, n, dim).
            mask: (batch, n), True marks a real token.

        Raises:
            UnsupportedError: if ``info.supports.dynamics`` is not promised, or this mixer is not causal.
        """
        if not self.supports.dynamics or not self.causal:
            why = "its outputs depend on later tokens" if self.supports.dynamics else "it is no linear recurrence of fixed size"
            raise self._refusal("dynamics", why, dynamics=True)
        self._validate(x, None, mask, None, None, None)
        return self.recurrence(zero_masked(x, mask), mask)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """The mechanism on validated input, zero at masked tokens; ``grid`` is resolved. Subclasses implement this."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement mix")

    def mix_all(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """How `forward` calls `mix`: once, on everything."""
        return self.mix(x, context, masks, grid)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """`mixing_matrix` on validated input. Subclasses that promise one implement this."""
        raise NotImplementedError(f"{type(self).__name__} promises a mixing matrix: implement matrix")

    def recurrence(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        """`dynamics` on validated input. Subclasses that promise them implement this."""
        raise NotImplementedError(f"{type(self).__name__} promises dynamics: implement recurrence")

    def mix_packed(self, x: Float[Tensor, "t c"], lengths: Sequence[int]) -> Float[Tensor, "t c"]:
        """`packed` on validated input; by default one sequence after the other."""
        parts = x.split(list(lengths))
        return torch.cat([self.mix(part[None], None, Masks(), (len(part) - self.num_prefix,))[0] for part in parts])

    def emit(self, name: str, value: Tensor | Callable[[], Tensor]) -> None:
        """Hand ``value`` to an open `attnlab.record`, under this module's path; a function is called only if someone wants it."""
        if recording():
            emit(self, name, value)

    def _refusal(self, asked: str, why: str, **wanted: object) -> UnsupportedError:
        return UnsupportedError(self.info.name, asked, why, alternatives(self.info, **wanted))

    def _validate(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        context_mask: Tensor | None,
        pair_mask: Tensor | None,
        grid: Grid | None,
    ) -> Grid:
        supports = self.supports
        self._check_tokens("x", x, self.dim)
        batch, n = x.shape[:2]
        if self.fixed_tokens not in (None, n):
            raise ValueError(f"x: expected {self.fixed_tokens} tokens as {supports.tokens_option} says, got {n}")
        if context is not None:
            if not supports.cross:
                raise self._refusal("context", "keys and values come from x itself", cross=True)
            if self.causal:
                raise self._refusal("context with causal=True", "two sequences have no common order")
            self._check_tokens("context", context, self.context_dim)
            if context.shape[0] != batch:
                raise ValueError(f"context: expected batch size {batch} as in x, got {context.shape[0]}")
        elif context_mask is not None:
            raise ValueError("context_mask: expected None without context; the mask of x is `mask`")
        m = n if context is None else context.shape[1]
        if mask is not None and not supports.mask:
            raise self._refusal("mask", "it cannot leave tokens out", mask=True)
        if pair_mask is not None and not supports.pair_mask:
            raise self._refusal("pair_mask", "it does not form pairs of query and key", pair_mask=True)
        check_mask("mask", mask, (batch, n))
        check_mask("context_mask", context_mask, (batch, m))
        check_pair_mask(pair_mask, (batch, self.num_heads, n, m))
        resolved = resolve_grid(grid, n - self.num_prefix)
        if len(resolved) not in supports.grid:
            raise self._refusal(f"a grid of rank {len(resolved)}", f"its ranks are {sorted(supports.grid)}", grid=len(resolved))
        return resolved

    def _check_tokens(self, name: str, x: Tensor, width: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor (batch, tokens, {width}), got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions (batch, tokens, {width}), got shape {tuple(x.shape)}")
        if x.shape[2] != width:
            raise ValueError(f"{name}: expected width {width}, got {x.shape[2]} in shape {tuple(x.shape)}")
        if x.shape[1] < 1:
            raise ValueError(f"{name}: expected at least one token, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}; embed token ids first")
        weight = next(self.parameters(), None)
        if weight is None:
            return
        if weight.device != x.device:
            raise ValueError(f"{name}: expected device {weight.device} as the parameters, got {x.device}")
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{name}: expected dtype {weight.dtype} as the parameters, got {x.dtype}; use .to({x.dtype}) on either"
            )
