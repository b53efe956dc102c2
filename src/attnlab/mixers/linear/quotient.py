"""What kernel attention shares: feature maps of queries and keys, two running sums, and their quotient."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.contract import StreamingMixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, token_positions
from attnlab.core.state import State
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
        place, index = {}, None
        if "position" in state:
            counted = mask if self.position.skips_padding else None
            index = token_positions(*x.shape[:2], counted, start=state["position"], device=x.device)
            place["position"] = state["position"] + (x.shape[1] if counted is None else counted.sum(dim=1))
        heads, total = self._quotient(*self.project(x, index=index), mask, state["sum"])
        return self.join(heads, x, mask), State({"sum": total, **place})

    def _quotient(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, initial: Tensor | None
    ) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h w e1"]]:
        q, k = self.features(q), self.features(k)
        if key_mask is not None:
            k = k.masked_fill(~key_mask[:, None, :, None], 0.0)
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        sums, total = linear_attention(q, k, v, initial_state=initial, causal=self.causal)
        return self.divide(sums), total

    @staticmethod
    def divide(sums: Float[Tensor, "b h n e1"]) -> Float[Tensor, "b h n e"]:
        """All columns but the last over the last; 0 where that is 0."""
        weight = sums[..., -1:]
        empty = weight == 0
        return (sums[..., :-1] / weight.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
