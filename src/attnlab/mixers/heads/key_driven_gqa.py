"""Key-driven grouped queries: key heads with long keys serve more query heads, anew in every forward pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.mixers.attention import DENSE, AttentionOptions
from attnlab.mixers.heads.allocation import heads_in_order, key_norms, rounded_shares, settle_by_size
from attnlab.mixers.heads.ragged_gqa import RaggedAttention

# The sizes depend on every key of the batch: on later ones, and on those that a mask of pairs would leave out.
KEY_DRIVEN = replace(DENSE, causal="no", pair_mask=False, streaming=False, state="none", batch_coupled=True, discontinuous=True)


def halved(num_heads: int, options: AttentionOptions) -> AttentionOptions:
    """``options`` with half as many key heads as query heads, the authors' default, where none are asked for."""
    if options.get("num_kv_heads") is not None:
        return options
    return {**options, "num_kv_heads": num_heads // 2 if num_heads % 2 == 0 else 1}


@mixers.register("key_driven_gqa", family="heads", paper="key-driven-gqa", supports=KEY_DRIVEN)
class KeyDrivenGQA(RaggedAttention):
    r"""Grouped-query attention whose groups follow the norms of the key heads (Khan et al. 2024, KDGQA).

    With $K_{bg} \in \mathbb{R}^{m \times d}$ the keys of example b and key head g, as attention sees them, and H query heads,

    $$m_g = \sum_b \lVert K_{bg} \rVert_F, \quad r_g = \frac{m_g - \min m}{\max m - \min m}, \quad
      n_g = \mathrm{round}\Big(H \frac{r_g}{\sum r}\Big)$$

    query heads read key head g, dealt contiguously; while $\sum n_g$ misses H, the largest $n_g$ loses a head or the smallest
    gains one, of equal ones the first. The norms are constants for autograd; tokens that are masked, or that no query may use,
    do not count in them. Time and memory are those of softmax attention. ``record`` collects "key_heads" (h,), the key head of
    each query head.

    By definition the key head with the shortest keys begins with no query head, and an example's groups depend on the others
    in its batch: evaluate with the batches that you mean, or with `RaggedGQA` and fixed sizes. Sizes that depend on
    all keys look into the future, so there is no causal form and no state.

    Args:
        dim: width of the tokens.
        num_heads: H.
        **options: those of `AttentionMixer`; ``num_kv_heads`` is half of ``num_heads`` by default.

    Raises:
        UnsupportedError: with ``causal=True``, or a position that adds to the values.

    Differs from the paper: norms that are all equal, up to rounding, give equal groups, where the formula has 0/0.
    """

    def __init__(self, dim: int, num_heads: int = 8, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **halved(num_heads, options))

    def key_heads(self, k: Float[Tensor, "b hk m d"], mask: Bool[Tensor, "b m"] | None) -> Int[Tensor, " h"]:
        """Dealt by the norms of these keys."""
        norms = key_norms(k, mask)
        low, high = norms.min(), norms.max()
        # a span that is rounding alone would be stretched to 0 and 1
        alike = high - low <= 8 * torch.finfo(norms.dtype).eps * high
        weights = torch.where(alike, torch.ones_like(norms), norms - low)
        sizes = settle_by_size(rounded_shares(weights, self.num_heads), self.num_heads)
        return heads_in_order(sizes, self.num_heads)
