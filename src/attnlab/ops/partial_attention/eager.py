"""Partial attention in blocks of queries, recomputed in the backward pass, so that memory grows with n + m."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnlab.core.masks import allowed_pairs
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import common_dtype
from attnlab.ops.partial_attention.fused import forward as fused

_BLOCK = 256


def partial_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    scale: float,
    bias: Float[Tensor, "#b #h #n #m"] | None,
    allowed: Bool[Tensor, "#b #h #n #m"] | None,
    causal: bool = False,
    key_mask: Bool[Tensor, "b m"] | None = None,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """The fast path; see `attnlab.ops.partial_attention.partial_attention`."""
    n, m = q.shape[2], k.shape[2]
    if 0 in (n, m):
        return _nothing(q, v)
    by_key = allowed is None or allowed.shape[2] == 1 < n
    if by_key and bias is None and q.device.type == "cpu" and (n == m or not causal):
        real = None if key_mask is None else key_mask.unsqueeze(1)
        if allowed is not None:
            allowed = allowed.squeeze(2).expand(len(q), -1, m)
            real = allowed if real is None else real & allowed
        return fused(*common_dtype(q=q, k=k, v=v), real, causal, scale)
    allowed = None if allowed is None else allowed.expand(-1, -1, n, m)
    outputs, lses = [], []
    for start in range(0, n, _BLOCK):
        rows = slice(start, min(start + _BLOCK, n))
        reach = max(0, rows.stop + m - n) if causal else m
        if reach == 0:
            output, lse = _nothing(q[:, :, rows], v)
            outputs.append(output)
            lses.append(lse)
            continue
        pairs = allowed_pairs(
            rows.stop - start,
            reach,
            causal=causal,
            key_mask=None if key_mask is None else key_mask[:, :reach],
            pair_mask=_cut(allowed, rows, reach),
            device=q.device,
        )
        block = (q[:, :, rows], k[:, :, :reach], v[:, :, :reach], _cut(bias, rows, reach), pairs, scale)
        if n <= _BLOCK or not torch.is_grad_enabled():
            output, lse = _block(*block)
        else:
            output, lse = checkpoint(_block, *block, use_reentrant=False, preserve_rng_state=False)
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def _nothing(q: Float[Tensor, "b h n d"], v: Float[Tensor, "b h m e"]) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """What queries without a key have."""
    return v.new_zeros((*q.shape[:3], v.shape[3])), q.new_full(q.shape[:3], float("-inf"), dtype=accumulate_dtype(q.dtype))


def _cut(x: Tensor | None, rows: slice, reach: int) -> Tensor | None:
    """What a tensor over pairs says of these queries and the first ``reach`` keys."""
    if x is None:
        return None
    return x[:, :, slice(None) if x.shape[2] == 1 else rows, :reach]


def _block(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    bias: Tensor | None,
    allowed: Bool[Tensor, "#b #h #n #m"] | None,
    scale: float,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    wide = accumulate_dtype(q.dtype)
    logits = ((q * scale) @ k.transpose(-1, -2)).to(wide)
    if bias is not None:
        logits = logits + bias.to(wide)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    peak = logits.amax(dim=-1, keepdim=True).detach()
    empty = peak == float("-inf")
    weights = (logits - peak.masked_fill(empty, 0.0)).exp()
    total = weights.sum(dim=-1, keepdim=True).masked_fill(empty, 1.0)
    output = (weights.to(v.dtype) @ v) / total.to(v.dtype)
    lse = (total.log() + peak).squeeze(-1)
    return output, lse
