"""Dense attention as its formula reads: all logits, mask, normalise, weigh the values."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.masks import allowed_pairs
from attnlab.ops.attention.normalizers import Normalizer, masked_weights
from attnlab.ops.attention.pairwise import Pairwise


def attention_map(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    *,
    scale: float,
    bias: Pairwise,
    factor: Pairwise,
    causal: bool,
    key_mask: Bool[Tensor, "b m"] | None,
    pair_mask: Bool[Tensor, "#b #h n m"] | None,
    normalizer: Normalizer,
) -> Float[Tensor, "b h n m"]:
    """What multiplies the values, formed; see `attnlab.ops.attention.attention_map`."""
    n, m = q.shape[2], k.shape[2]
    grouped = rearrange(q, "b (hk g) n d -> b hk g n d", hk=k.shape[1])
    logits = torch.einsum("bkgnd,bkmd->bkgnm", grouped, k).flatten(1, 2) * scale
    term = bias.expanded(q, m, scale)
    if term is not None:
        logits = logits + term
    allowed = allowed_pairs(n, m, causal=causal, key_mask=key_mask, pair_mask=pair_mask, device=q.device)
    weights = masked_weights(logits, allowed, normalizer)
    edit = factor.expanded(q, m, scale)
    return weights if edit is None else weights * edit


def attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    *,
    scale: float,
    bias: Pairwise,
    factor: Pairwise,
    causal: bool,
    key_mask: Bool[Tensor, "b m"] | None,
    pair_mask: Bool[Tensor, "#b #h n m"] | None,
    normalizer: Normalizer,
) -> Float[Tensor, "b h n e"]:
    """The oracle; see `attnlab.ops.attention.attention`."""
    weights = attention_map(
        q,
        k,
        scale=scale,
        bias=bias,
        factor=factor,
        causal=causal,
        key_mask=key_mask,
        pair_mask=pair_mask,
        normalizer=normalizer,
    )
    weights = rearrange(weights, "b (hk g) n m -> b hk g n m", hk=k.shape[1])
    return torch.einsum("bkgnm,bkme->bkgne", weights, v).flatten(1, 2)
