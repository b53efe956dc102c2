"""Attention maps as such: graphs with a weight for each pair of tokens, formed by definition."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.masks import Masks, allowed_pairs
from attnlab.ops.attention.normalizers import create_normalizer, masked_weights
from attnlab.ops.attention.pairwise import Pairwise


def attention_map(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    allowed: Bool[Tensor, "#b #h #n #m"] | None,
    *,
    scale: float | None = None,
    bias: Float[Tensor, "#b #h #n #m"] | Pairwise | None = None,
    factor: Float[Tensor, "#b #h #n #m"] | Pairwise | None = None,
    normalizer: str = "softmax",
) -> Float[Tensor, "b h n m"]:
    r"""$A = c \odot \mathrm{normalizer}(s\, q k^\top + b)$: what multiplies the values in attention, without any values.

    Graph mechanisms compute with the map itself, so that it is formed: memory O(n m) a head.

    Args:
        q: queries.
        k: keys.
        allowed: pairs that may be used; the others have weight 0. None allows all.
        scale: s; by default d ** -0.5.
        bias: b, added to the scaled products.
        factor: c, multiplies the weights.
        normalizer: as `attnlab.ops.attention.attention` takes it.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.matmul(q, k.transpose(-1, -2)) * scale
    term = Pairwise.of(bias).expanded(q, k.shape[2], scale)
    weights = masked_weights(logits if term is None else logits + term, allowed, create_normalizer(normalizer))
    edit = Pairwise.of(factor).expanded(q, k.shape[2], scale)
    return weights if edit is None else weights * edit


def pairs_of(q: Tensor, k: Tensor, masks: Masks, *, causal: bool) -> Bool[Tensor, "#b #h #n #m"] | None:
    """The pairs that causality and all masks allow; None for all."""
    return allowed_pairs(q.shape[2], k.shape[2], causal=causal, key_mask=masks.key, pair_mask=masks.pair, device=q.device)
