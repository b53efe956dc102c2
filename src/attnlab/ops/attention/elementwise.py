"""Attention whose weights depend on their own logit alone: blocks of queries, recomputed in the backward pass."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnlab.core.masks import causal_pairs
from attnlab.ops.attention.normalizers import NORMALIZERS, masked_weights

_BLOCK = 256


def elementwise_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    *,
    scale: float,
    bias: Float[Tensor, "#b #h #n #m"] | None,
    causal: bool,
    key_mask: Bool[Tensor, "b m"] | None,
    pair_mask: Bool[Tensor, "#b #h n m"] | None,
    normalizer: str,
) -> Float[Tensor, "b h n e"]:
    """Blocks of 256 queries, each against the keys it can reach, so that memory grows with n and not with n squared."""
    n, m = q.shape[2], k.shape[2]
    grouped = rearrange(q, "b (hk g) n d -> b hk g n d", hk=k.shape[1])
    pieces = []
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        reach = stop + m - n if causal else m
        if reach <= 0:
            pieces.append(torch.zeros_like(grouped[:, :, :, start:stop, :1]).expand(-1, -1, -1, -1, v.shape[3]).flatten(1, 2))
            continue
        allowed = None if key_mask is None else key_mask[:, None, None, :reach]
        if pair_mask is not None:
            block_pairs = pair_mask[:, :, start:stop, :reach]
            allowed = block_pairs if allowed is None else allowed & block_pairs
        if causal:
            triangle = causal_pairs(stop - start, reach, q.device)[None, None]
            allowed = triangle if allowed is None else allowed & triangle
        rows = (grouped[:, :, :, start:stop], k[:, :, :reach], v[:, :, :reach], _cut(bias, start, stop, reach), allowed)
        if n <= _BLOCK or not torch.is_grad_enabled():
            pieces.append(_block(*rows, scale, normalizer))
        else:
            pieces.append(checkpoint(_block, *rows, scale, normalizer, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(pieces, dim=2)


def _cut(bias: Tensor | None, start: int, stop: int, reach: int) -> Tensor | None:
    if bias is None:
        return None
    rows = bias if bias.shape[2] == 1 else bias[:, :, start:stop]
    return rows if rows.shape[3] == 1 else rows[..., :reach]


def _block(
    q: Float[Tensor, "b hk g n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    bias: Tensor | None,
    allowed: Bool[Tensor, "#b #h #n #m"] | None,
    scale: float,
    normalizer: str,
) -> Float[Tensor, "b h n e"]:
    b, hk, g, n, _ = q.shape
    logits = ((q * scale).reshape(b, hk, g * n, -1) @ k.transpose(-1, -2)).view(b, hk * g, n, -1)
    if bias is not None:
        logits = logits + bias
    weights = masked_weights(logits, allowed, NORMALIZERS[normalizer])
    return (weights.view(b, hk, g * n, -1) @ v).view(b, hk * g, n, -1)
