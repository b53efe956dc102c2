"""What kernel attention shares: feature maps of queries and keys, two running sums, and their quotient."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.linear.core import LINEAR, LinearMixer
from attnlab.mixers.linear.normalizers import divide

__all__ = ["LINEAR", "QuotientAttention"]


class QuotientAttention(LinearMixer):
    r"""$o_i = \phi(q_i)^\top \sum_j \phi(k_j) v_j^\top \,/\, \phi(q_i)^\top \sum_j \phi(k_j)$, over all j or j <= i where causal.

    The `LinearMixer` whose normaliser divides. A subclass gives $\phi$ as `features`, and its width. Queries whose denominator is
    0 give exactly 0.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        **options: those of `AttentionMixer`; ``num_kv_heads`` must be all, ``position`` one that changes queries and keys alone.

    Raises:
        ValueError: for grouped keys, or a position that acts on logits, weights or values.
    """

    def __init__(self, dim: int, num_heads: int = 8, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)

    @staticmethod
    def divide(sums: Float[Tensor, "b h n e1"]) -> Float[Tensor, "b h n e"]:
        """All columns but the last over the last; 0 where that is 0."""
        return divide(sums[..., :-1], sums[..., -1:])
