"""Partial attention in blocks of queries, recomputed in the backward pass, so that memory grows with n + m."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnlab.ops.backends import accumulate_dtype

_BLOCK = 256


def partial_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    scale: float,
    bias: Float[Tensor, "#b #h #n #m"] | None,
    allowed: Bool[Tensor, "#b #h #n #m"] | None,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """The fast path; see `attnlab.ops.partial_attention.partial_attention`."""
    n = q.shape[2]
    if k.shape[2] == 0:
        wide = accumulate_dtype(q.dtype)
        return v.new_zeros((*q.shape[:3], v.shape[3])), q.new_full(q.shape[:3], float("-inf"), dtype=wide)
    outputs, lses = [], []
    for start in range(0, n, _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = (q[:, :, rows], k, v, _rows(bias, rows), _rows(allowed, rows), scale)
        if n <= _BLOCK or not torch.is_grad_enabled():
            output, lse = _block(*block)
        else:
            output, lse = checkpoint(_block, *block, use_reentrant=False, preserve_rng_state=False)
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return x if x is None or x.shape[2] == 1 else x[:, :, rows]


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
