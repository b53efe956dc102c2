"""The core of linear attention: feature maps of queries and keys, running sums, a normaliser, and slots around them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.dynamics import Dynamics
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, token_positions
from attnlab.core.state import Before, State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.linear.normalizers import Divide, Normalizer, Sums
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import full_precision
from attnlab.ops.linear_attention import linear_attention
from attnlab.positions.base import Position

# What attention through feature maps promises.
LINEAR = Supports(
    causal="optional",
    cross=True,
    streaming=True,
    grid=frozenset({1, 2, 3}),
    mixing_matrix=True,
    permutation_equivariant=True,
    state="bounded",
    associative=True,
    dynamics=True,
    cost=1.0,
)


def real_only(x: Float[Tensor, "b h m d"], mask: Bool[Tensor, "b m"] | None) -> Float[Tensor, "b h m d"]:
    """``x``, 0 at masked tokens."""
    return x if mask is None else x.masked_fill(~mask[:, None, :, None], 0.0)


def running_sum(
    x: Float[Tensor, "b h n d"], initial: Float[Tensor, "b h d"] | None, *, causal: bool
) -> Float[Tensor, "b h #n d"]:
    """``initial`` plus the sum over the tokens up to each, or over all."""
    total = x.cumsum(2) if causal else x.sum(2, keepdim=True)
    return total if initial is None else total + initial.unsqueeze(2)


class LinearMixer(AttentionMixer, StreamingMixer):
    r"""$o_i = \mathrm{normalise}\big(\phi(q_i)^\top \sum_j w_j \phi(k_j) v_j^\top\big)$, over all j or j <= i where causal.

    The slots, which subclasses fill: `features` and `feature_width` ($\phi$), `weigh_keys` ($w$), ``normalizer``, `turn` (a
    position in the features of the products, not in those of the normaliser), `weigh_outputs` (a factor from the query's token),
    `local` (what a neighbourhood adds), `weigh_heads` (an output gate).

    The state ``sum`` (b, h, width, d + 1) holds the outer products, with a column of ones for the normaliser; if that reads the
    values' sum and their number, these are one more row. ``position`` (b,) is there with a position of either kind.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        normalizer: what becomes of the sums; `Divide` by default.
        **options: those of `AttentionMixer`; ``num_kv_heads`` must be all, ``position`` one that changes queries and keys alone.

    Raises:
        ValueError: for grouped keys, or a position that acts on logits, weights or values.
    """

    memory = ("sum",)
    turns: bool = False
    """Whether `turn` does something."""
    rank: int | None = None
    """Rank of the grid that local terms and turns are built for; None if it is of no account. See `lifted`."""
    promised: Supports | None = None

    def __init__(
        self, dim: int, num_heads: int = 8, *, normalizer: Normalizer | None = None, **options: Unpack[AttentionOptions]
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if self.num_kv_heads != num_heads:
            raise ValueError(f"num_kv_heads: expected {num_heads} (every head keeps its own sum), got {self.num_kv_heads}")
        kind = type(self.position)
        if kind.bias is not Position.bias or kind.factor is not Position.factor or kind.reads_values:
            raise ValueError(
                f"position: expected one in queries and keys, there are no logits to change, got {self.position_name!r}"
            )
        self.normalizer = Divide() if normalizer is None else normalizer

    @property
    def supports(self) -> Supports:
        """What `promise` says once the options are known."""
        return self.info.supports if self.promised is None else self.promised

    def promise(self, **changes: Any) -> None:
        """Fix the promises for these options, ``changes`` on top; the last thing that a constructor with slots of its own does.

        Two sequences have no common places to turn features by; kernels of a rank lie on grids up to that rank.
        """
        found = replace(self.info.supports, **changes)
        if self.turns:
            found = replace(found, cross=False, permutation_equivariant=False)
        self.promised = found if self.rank is None else replace(found, grid=frozenset(range(1, self.rank + 1)))

    @property
    def feature_width(self) -> int:
        """Width of what `features` gives."""
        return self.head_dim

    def features(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n w"]:
        r"""$\phi$ of queries or keys."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement features")

    def weigh_keys(self, q: Float[Tensor, "b h n w"], k: Float[Tensor, "b h m w"], masks: Masks) -> Float[Tensor, "b h m w"]:
        """Features of keys times a weight for each; what stands at masked keys is of no account."""
        return k

    def turn(self, x: Float[Tensor, "b h n w"], index: Int[Tensor, "#b n"] | None, grid: Grid | None) -> Float[Tensor, "b h n w"]:
        """Features with a position, at the places ``index`` of the sequence, or of the whole ``grid``."""
        return x

    def weigh_outputs(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n 1"] | None:
        """A factor of each query's output; None for 1."""
        return None

    def local(
        self, x: Float[Tensor, "b n c"], v: Float[Tensor, "b h n d"], masks: Masks, grid: Grid
    ) -> Float[Tensor, "b h n d"] | None:
        """What is added to the outputs of self-attention; None for nothing."""
        return None

    def lifted(self, grid: Grid) -> Grid:
        """A grid of the mixer's rank: sides of 1 come first."""
        return (1,) * ((self.rank or 0) - len(grid)) + tuple(grid)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """The normalised sums."""
        index = torch.arange(q.shape[2], device=q.device)[None] if self.turns else None
        return self.read(q, k, v, masks, grid, index)[0]

    @full_precision
    def read(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m e"],
        masks: Masks,
        grid: Grid | None,
        index: Int[Tensor, "#b n"] | None,
        initial: Float[Tensor, "b h w1 e1"] | None = None,
    ) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h w1 e1"]]:
        """Outputs, and the sums after the last token."""
        dtype, wide = v.dtype, accumulate_dtype(v.dtype)
        q, k = self._features_of(q.to(wide), k.to(wide), masks)
        v = with_ones(v.to(wide), masks.key)
        sums, after = self._sums(q, k, v, grid, index, None if initial is None else initial.to(wide))
        return self.normalizer(sums).to(dtype), after

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Project, read the sums, add what is local, project back."""
        q, k, v = self.project(x, context, self.place(x, masks.query))
        heads = self._weighed(self.attend(q, k, v, masks, grid), x)
        self.emit("values", v)
        self.emit("mixed", heads)
        self.emit("attention", lambda: self._weighed(self.attend(q, k, self.identity(k), masks, grid), x))
        near = self.local(x, v, masks, grid) if context is None else None
        return self.join(heads if near is None else heads + near, x, masks.query)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What becomes of identity values."""
        return self._weighed(super().matrix(x, context, masks, grid), x)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """Empty sums."""
        shape = (batch_size, self.num_heads, self.feature_width + self.normalizer.needs_values, self.head_dim + 1)
        state = {"sum": torch.zeros(shape, device=device, dtype=accumulate_dtype(dtype))}
        if self.turns or self.position_name != "none":
            state["position"] = torch.zeros(batch_size, device=device, dtype=torch.int64)
        return State(state)

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Add the new tokens to the sums and read."""
        place = {}
        if "position" in state:
            counted = mask if self.position.skips_padding else None
            place["position"] = state["position"] + (x.shape[1] if counted is None else counted.sum(dim=1))
        index = self._index(x, state, mask)
        q, k, v = self.project(x, index=index)
        heads, total = self.read(q, k, v, Masks(mask, mask), None, index, state["sum"])
        return self.join(self._weighed(heads, x), x, mask), State({"sum": total, **place})

    def place_of(self, before: Before) -> Int[Tensor, "b"]:
        """Real tokens alone where the position counts these."""
        return before.real if self.position.skips_padding else before.count

    def digest(self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None) -> State:
        """The sums over the piece."""
        index = self._index(x, state, mask)
        q, k, v = self.project(x, index=index)
        wide = accumulate_dtype(v.dtype)
        _, k = self._features_of(q.to(wide), k.to(wide), Masks(mask, mask))
        v = with_ones(v.to(wide), mask)
        total = k.mT @ v
        if self.turns:
            total = torch.cat((self.turn(k, index, None).mT @ v[..., :-1], total[..., -1:]), dim=-1)
        if self.normalizer.needs_values:
            total = torch.cat((total, v.sum(2, keepdim=True)), dim=2)
        return State({"sum": total})

    def fold(self, earlier: State, later: State) -> dict[str, Tensor]:
        """Sums add."""
        return {"sum": earlier["sum"] + later["sum"]}

    def recurrence(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        """Nothing decays; keys' features enter (and a one, if the normaliser reads the values' sum), queries' features read."""
        index = self.place(x, mask)
        q, k, v = self.project(x, index=index)
        q, k = self._features_of(q, k, Masks(mask, mask))
        v = with_ones(v, mask)
        sums, _ = self._sums(q, k, v, None, index, None)
        q, k = (self.turn(t, index, None) for t in (q, k))
        values = sums.values
        if self.normalizer.needs_values:
            q, k = torch.cat((q, torch.zeros_like(q[..., :1])), dim=-1), torch.cat((k, v[..., -1:]), dim=-1)
            values = torch.zeros_like(q)
            values[..., -1] = 1.0
        read = self.normalizer(Sums(q, sums.weight, values, sums.number))
        return Dynamics(torch.ones_like(k), k, self._weighed(read, x))

    def _index(self, x: Tensor, state: State, mask: Tensor | None) -> Tensor | None:
        if "position" not in state:
            return None
        counted = mask if self.position.skips_padding else None
        return token_positions(*x.shape[:2], counted, start=state["position"], device=x.device)

    def _weighed(self, heads: Float[Tensor, "b h n e"], x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n e"]:
        factor = self.weigh_outputs(x)
        return heads if factor is None else heads * factor

    def _features_of(self, q: Tensor, k: Tensor, masks: Masks) -> tuple[Float[Tensor, "b h n w"], Float[Tensor, "b h m w"]]:
        q, k = self.features(q), self.features(k)
        return q, real_only(self.weigh_keys(q, k, masks), masks.key)

    def _sums(
        self,
        q: Float[Tensor, "b h n w"],
        k: Float[Tensor, "b h m w"],
        v: Float[Tensor, "b h m e1"],
        grid: Grid | None,
        index: Int[Tensor, "#b n"] | None,
        initial: Float[Tensor, "b h w1 e1"] | None,
    ) -> tuple[Sums, Float[Tensor, "b h w1 e1"]]:
        """What each query reads of values that end in a column of ones, and the sums after the last token."""
        width, causal = k.shape[-1], self.causal
        first = None if initial is None else initial[:, :, :width]
        if self.turns:
            turned = self.turn(q, index, grid), self.turn(k, index, grid)
            start = None if first is None else first[..., :-1]
            products, after = linear_attention(*turned, v[..., :-1], initial_state=start, causal=causal)
            keys = running_sum(k, None if first is None else first[..., -1], causal=causal)
            weight = (q * keys).sum(-1, keepdim=True)
            after = torch.cat((after, keys[:, :, -1:].mT), dim=-1)
        else:
            both, after = linear_attention(q, k, v, initial_state=first, causal=causal)
            products, weight = both[..., :-1], both[..., -1:]
        if not self.normalizer.needs_values:
            return Sums(products, weight), after
        total = running_sum(v, None if initial is None else initial[:, :, width], causal=causal)
        sums = Sums(products, weight, total[..., :-1], total[..., -1:].clamp(min=1.0))
        return sums, torch.cat((after, total[:, :, -1:]), dim=2)


def with_ones(v: Float[Tensor, "b h m e"], mask: Bool[Tensor, "b m"] | None) -> Float[Tensor, "b h m e1"]:
    """Values with a column of ones; all zero at masked tokens."""
    return real_only(torch.cat((v, torch.ones_like(v[..., :1])), dim=-1), mask)
