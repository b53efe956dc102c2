"""Partial attention as its formula reads."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.masks import allowed_pairs
from attnlab.ops.backends import accumulate_dtype


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
    """The oracle; see `attnlab.ops.partial_attention.partial_attention`."""
    wide = accumulate_dtype(q.dtype)
    logits = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if bias is not None:
        logits = logits + bias.to(wide)
    n, m = logits.shape[2:]
    pairs = None if allowed is None else allowed.expand(-1, -1, n, m)
    allowed = allowed_pairs(n, m, causal=causal, key_mask=key_mask, pair_mask=pairs, device=q.device)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    empty = (logits == float("-inf")).all(dim=-1)
    safe = logits.masked_fill(empty.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(safe, dim=-1) if k.shape[2] else safe.new_zeros(safe.shape[:-1])
    weights = (safe - lse.unsqueeze(-1)).exp().masked_fill(empty.unsqueeze(-1), 0.0)
    return (weights @ v.to(wide)).to(v.dtype), lse.masked_fill(empty, float("-inf"))
