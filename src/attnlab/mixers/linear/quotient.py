"""What kernel attention shares: feature maps of queries and keys, two running sums, and their quotient."""

from __future__ import annotations

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


class QuotientAttention(AttentionMixer, StreamingMixer):
    r"""$o_i = \phi(q_i)^\top \sum_j \phi(k_j) v_j^\top \,/\, \phi(q_i)^\top \sum_j \phi(k_j)$, over all j or j <= i where causal.

    A subclass gives $\phi$ as `features`, and its width. Queries whose denominator is 0 give exactly 0. State: ``sum``
    (b, h, width, d + 1), the outer products with a column of ones for the denominator, and ``position`` (b,) if there is one.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        **options: those of `AttentionMixer`; ``num_kv_heads`` must be all, ``position`` one that changes queries and keys alone.

    Raises:
        ValueError: for grouped keys, or a position that acts on logits, weights or values.
    """

    def __init__(self, dim: int, num_heads: int = 8, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        if self.num_kv_heads != num_heads:
            raise ValueError(f"num_kv_heads: expected {num_heads} (every head keeps its own sum), got {self.num_kv_heads}")
        kind = type(self.position)
        if kind.bias is not Position.bias or kind.factor is not Position.factor or kind.reads_values:
            raise ValueError(
                f"position: expected one in queries and keys, there are no logits to change, got {self.position_name!r}"
            )

    memory = ("sum",)

    @property
    def feature_width(self) -> int:
        """Width of what `features` gives."""
        return self.head_dim

    def features(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n w"]:
        """$\\phi$ of queries or keys."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement features")

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """The quotient of the two sums."""
        return self._quotient(q, k, v, masks.key, None)[0]

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """Empty sums."""
        shape = (batch_size, self.num_heads, self.feature_width, self.head_dim + 1)
        state = {"sum": torch.zeros(shape, device=device, dtype=dtype)}
        if self.position_name != "none":
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
        heads, total = self._quotient(*self.project(x, index=self._index(x, state, mask)), mask, state["sum"])
        return self.join(heads, x, mask), State({"sum": total, **place})

    def place_of(self, before: Before) -> Int[Tensor, "b"]:
        """Real tokens alone where the position counts these."""
        return before.real if self.position.skips_padding else before.count

    def digest(self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None) -> State:
        """The sum over the piece."""
        _, k, v = self.project(x, index=self._index(x, state, mask))
        k, v = self._weighted(self.features(k), v, mask)
        return State({"sum": k.mT @ v})

    def fold(self, earlier: State, later: State) -> dict[str, Tensor]:
        """Sums add."""
        return {"sum": earlier["sum"] + later["sum"]}

    def recurrence(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        """Nothing decays; keys' features enter, and queries' features over the denominator read."""
        q, k, v = self.project(x, index=self.place(x, mask))
        q, (k, v) = self.features(q), self._weighted(self.features(k), v, mask)
        weight = (q * k.cumsum(2)).sum(-1, keepdim=True)
        return Dynamics(torch.ones_like(k), k, self.divide(torch.cat((q, weight), dim=-1)))

    def _index(self, x: Tensor, state: State, mask: Tensor | None) -> Tensor | None:
        if "position" not in state:
            return None
        counted = mask if self.position.skips_padding else None
        return token_positions(*x.shape[:2], counted, start=state["position"], device=x.device)

    @staticmethod
    def _weighted(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of real keys alone, and values with a column of ones for the denominator."""
        k = k if mask is None else k.masked_fill(~mask[:, None, :, None], 0.0)
        return k, torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)

    def _quotient(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, initial: Tensor | None
    ) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h w e1"]]:
        q, (k, v) = self.features(q), self._weighted(self.features(k), v, key_mask)
        sums, total = linear_attention(q, k, v, initial_state=initial, causal=self.causal)
        return self.divide(sums), total

    @staticmethod
    def divide(sums: Float[Tensor, "b h n e1"]) -> Float[Tensor, "b h n e"]:
        """All columns but the last over the last; 0 where that is 0."""
        weight = sums[..., -1:]
        empty = weight == 0
        return (sums[..., :-1] / weight.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
