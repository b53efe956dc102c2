"""ReLU attention: rectified scores over the number of keys in place of the row's softmax."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.attention import DENSE, AttentionOptions, CachedAttention
from attnlab.mixers.parts.counts import key_counts


@mixers.register("relu", family="dense", supports=DENSE)
class ReluAttention(CachedAttention):
    r"""Attention with rectified scores (Wortsman et al. 2023, Replacing softmax with ReLU in vision transformers).

    $$o_i = n_i^{-a} \sum_j \max\left(d^{-1/2}\, q_i^\top k_j + b_{ij},\, 0\right) v_j$$

    with $n_i$ the number of keys that query i may use. Weights do not compete and may all be 0; with a = 1 the size of the output
    at initialisation does not depend on the length. Time O(n m d), memory O(n + m).

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        count_power: a, how much the number of keys divides.
        **options: those of `AttentionMixer`.

    Raises:
        ValueError: for a negative ``count_power``.

    Differs from the paper: with ``causal=True`` the count is that of each row, not the sequence's length, so that an output does
    not depend on how many tokens follow and streaming is exact.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, count_power: float | int = 1.0, **options: Unpack[AttentionOptions]
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if count_power < 0:
            raise ValueError(f"count_power: expected at least 0, got {count_power}")
        self.count_power = float(count_power)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Rectified weights over the allowed keys, divided by their number."""
        counts = key_counts(q, k.shape[2], causal=self.causal, key_mask=masks.key, pair_mask=masks.pair)
        return self.dense(q, k, v, masks, grid, normalizer="relu") / counts**self.count_power
