"""The contract of a mixer that runs piece by piece, and whose pieces can be summed up apart and put together."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks, zero_masked
from attnlab.core.record import recording
from attnlab.core.state import Before, State


class StreamingMixer(Mixer):
    """A causal mixer that can also run piece by piece.

    A subclass implements `begin` (the empty state) and `advance` (n >= 1 more tokens); for any split of a sequence, `extend`
    piece by piece gives what `forward` gives at once.

    A mixer that promises ``associative`` can also sum a piece up without the state before it (`summarize`) and put summaries
    together in any grouping (`combine`): with tokens spread over devices, all that is exchanged are summaries. It names the
    tensors of its state that summaries hold in ``memory``, the tokens that a short convolution looks back in ``lookback``, and
    implements `digest` and `fold`.
    """

    memory: ClassVar[tuple[str, ...]] = ()
    lookback: int = 0
    piece: ClassVar[int] = 16384
    """Tokens of a batch that `forward` takes at a time in eval mode without gradients, where the state is bounded: memory beyond
    inputs and outputs is then that of a piece, however long the sequence."""

    def init_state(self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        """The state before the first token.

        Args:
            batch_size: examples in the batch.
            device: where its tensors live; by default where the parameters are.
            dtype: of its tensors; by default the parameters'.

        Raises:
            UnsupportedError: if this mixer was not built with ``causal=True``.
        """
        if not self.supports.streaming:  # an option took the promise back
            return super().init_state(batch_size)
        self._demand_causal()
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        weight = next(self.parameters(), torch.empty(0))
        return self.begin(batch_size, device or weight.device, dtype or weight.dtype)

    def extend(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Process the next n >= 1 tokens: prefill and decoding step are this one method.

        Args:
            x: the next tokens, (batch, n, dim).
            state: what `init_state` or the last call returned; it is not changed.
            mask: (batch, n), True marks a real token.

        Returns:
            The outputs (batch, n, dim) and the state after them.
        """
        if not self.supports.streaming:
            return super().extend(x, state, mask=mask)
        self._demand_causal()
        if not isinstance(state, State):
            raise TypeError(f"state: expected attnlab.State as init_state returns it, got {type(state).__name__}")
        self._validate(x, None, mask, None, None, None)
        size = next(iter(state.values())).shape[0]
        if size != x.shape[0]:
            raise ValueError(f"state: expected batch size {x.shape[0]} as in x, got {size}")
        y, state = self.advance(zero_masked(x, mask), state, mask=mask)
        return zero_masked(y, mask), state

    def summarize(
        self, x: Float[Tensor, "b n c"], before: Before | None = None, *, mask: Bool[Tensor, "b n"] | None = None
    ) -> State:
        """What n >= 1 tokens do to the memory, whatever it holds: an element of the monoid that `combine` is the product of.

        Args:
            x: the piece, (batch, n, dim).
            before: what stands before it; None if it is the beginning of the sequence.
            mask: (batch, n), True marks a real token.

        Raises:
            UnsupportedError: if ``info.supports.associative`` is not promised.
        """
        if not self.supports.associative:
            return super().summarize(x, before, mask=mask)
        self._validate(x, None, mask, None, None, None)
        return self.digest(zero_masked(x, mask), self.opening(x, before), mask=mask)

    def combine(self, earlier: State, later: State) -> State:
        """One summary for two pieces that follow each other; associative.

        Args:
            earlier: a summary, or a state, whose memory is brought past the piece; its windows and positions stay.
            later: the summary of the piece that follows.
        """
        if not self.supports.associative:
            return super().combine(earlier, later)
        return earlier.replace(**self.fold(earlier, later))

    def opening(self, x: Float[Tensor, "b n c"], before: Before | None = None) -> State:
        """The state before the piece ``x`` with windows and positions as they are there, and an empty memory."""
        empty = self.begin(x.shape[0], x.device, x.dtype)
        if before is None:
            return empty
        state = empty
        if self.lookback:
            _, after = self.advance(zero_masked(before.tokens, before.mask), empty, mask=before.mask)
            state = after.replace(**{name: empty[name] for name in self.memory})
        return state.replace(position=self.place_of(before)) if "position" in state else state

    def place_of(self, before: Before) -> Int[Tensor, "b"]:
        """The position at which the piece after ``before`` begins; masked tokens take a place."""
        return before.count

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The empty state."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement begin")

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """`extend` on validated input, zero at masked tokens."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement advance")

    def digest(self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None) -> State:
        """`summarize` on validated input; ``state`` is the `opening`."""
        raise NotImplementedError(f"{type(self).__name__} promises associative: implement digest")

    def fold(self, earlier: State, later: State) -> dict[str, Tensor]:
        """The tensors of `combine`: those of ``memory``, and those that carry an earlier memory on where ``earlier`` has them."""
        raise NotImplementedError(f"{type(self).__name__} promises associative: implement fold")

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """The whole sequence at once is one piece from the empty state; mixers with a non-causal form override this."""
        return self.advance(x, self.begin(x.shape[0], x.device, x.dtype), mask=masks.query)[0]

    def mix_all(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """A long sequence goes through a state of bounded size in pieces, in eval mode without gradients; see ``piece``."""
        rows = max(1, self.piece // x.shape[0])
        watched = self.training or torch.is_grad_enabled() or recording() or torch.compiler.is_compiling()
        bounded = self.causal and self.supports.streaming and self.supports.state == "bounded"
        sequence = context is None and masks.pair is None and tuple(grid) == (x.shape[1],)
        if watched or not bounded or not sequence or x.shape[1] <= rows:
            return self.mix(x, context, masks, grid)
        state, outputs = self.begin(x.shape[0], x.device, x.dtype), x
        for start in range(0, x.shape[1], rows):
            part = slice(start, start + rows)
            mask = None if masks.query is None else masks.query[:, part]
            y, state = self.advance(x[:, part], state, mask=mask)
            outputs = outputs if start else y.new_empty(x.shape)  # autocast may give another dtype than that of x
            outputs[:, part] = y
        return outputs

    def _demand_causal(self) -> None:
        if not self.causal:
            raise self._refusal(
                "streaming with causal=False", "earlier outputs would depend on later tokens; build it with causal=True"
            )
