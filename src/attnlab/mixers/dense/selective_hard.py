"""Selective hard attention: softmax over the k largest scores of each row."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import DENSE, AttentionOptions, CachedAttention
from attnlab.ops.attention import TopKSoftmax


@mixers.register(
    "selective_hard",
    family="dense",
    paper="axformer",
    partial=True,
    supports=replace(DENSE, discontinuous=True),
    example={"k": 4},
)
class SelectiveHardAttention(CachedAttention):
    r"""Attention that keeps the k largest scores of each row (Nagarajan et al. 2020, AxFormer).

    $$o_i = \sum_{j \in T_i} \frac{e^{s_{ij}}}{\sum_{l \in T_i} e^{s_{il}}}\, v_j, \qquad
      s_{ij} = d^{-1/2}\, q_i^\top k_j + b_{ij}$$

    with $T_i$ the k allowed keys of the largest $s_{ij}$. Its parameters are those of "softmax", so that a trained layer is
    switched, or switched back, at inference: ``mixer.k = 16``, ``mixer.k = None``. Scores that are left out have no gradient.
    All scores are formed, in blocks of queries: time O(n m d), memory O(n + m). Which of two nearly equal scores is kept is up to
    rounding, so that in half precision a few outputs differ by more than rounding.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        k: keys that a query keeps, by default 8; rows with fewer keep all. None for plain softmax.
        **options: those of `AttentionMixer`.

    Raises:
        ValueError: for a k below 1.

    Differs from the paper: of equal scores at the border some are kept, so that exactly k are. The greedy search for which
    layers take which k is not part of the mechanism.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, k: int | None = 8, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        self.k = k

    @property
    def k(self) -> int | None:
        """How many keys a query keeps, None for all; can be set at any time."""
        return self._k

    @k.setter
    def k(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise ValueError(f"k: expected a positive integer or None, got {value}")
        self._k = value

    @property
    def supports(self) -> Supports:
        """Plain softmax makes no choice."""
        return DENSE if getattr(self, "_k", 1) is None else self.info.supports

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the largest scores of the allowed keys."""
        return self.dense(q, k, v, masks, grid, normalizer="softmax" if self.k is None else TopKSoftmax(self.k))
