"""Softmax attention: multi-head, grouped-query and multi-query, with any registered position."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.attention import CACHED, AttentionOptions, CachedAttention


@mixers.register("softmax", family="dense", supports=CACHED)
class SoftmaxAttention(CachedAttention):
    r"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2), with grouped keys and values (Ainslie et al. 2023).

    For query head h that reads key head g(h), head width d and a position's bias b,

    $$o_i = \sum_j \mathrm{softmax}_j\!\left(d^{-1/2}\, q_i^\top k_j + b_{ij}\right) v_j .$$

    Time O(n m d), memory O(n + m): PyTorch's fused kernel is called. The state holds all keys and values.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        normalizer: "softmax", or "softmax_plus_one" with 1 added to the denominator (Miller 2023): a head may attend to nothing.
        **options: those of `AttentionMixer`; ``num_kv_heads=1`` is multi-query attention.

    Raises:
        ValueError: for an unknown normaliser.

    Differs from the paper: positions are a slot, "none" by default; no dropout on the weights.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, normalizer: str = "softmax", **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        if normalizer not in ("softmax", "softmax_plus_one"):
            raise ValueError(f"normalizer: expected 'softmax' or 'softmax_plus_one', got {normalizer!r}")
        self.normalizer = normalizer

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the allowed keys."""
        return self.dense(q, k, v, masks, grid, normalizer=self.normalizer)
