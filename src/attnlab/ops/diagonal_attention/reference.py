"""Diagonal attention as its formula reads: how often each pair is named, and a softmax over all pairs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    distances: Int[Tensor, "b h r"],
    allowed: Bool[Tensor, "b #h m"] | None,
    scale: float,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """Output and log-sum-exp; see `attnlab.ops.diagonal_attention.diagonal_attention`."""
    wide = accumulate_dtype(q.dtype)
    if allowed is not None:
        k, v = (_without(x, allowed, q.shape[1]) for x in (k, v))
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    apart = torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(k.shape[2], device=q.device)
    times = (apart[None, None, :, :, None] == distances[:, :, None, None]).sum(-1).to(wide)
    if allowed is not None:
        times = times.masked_fill(~allowed.unsqueeze(2), 0.0)
    empty = (times == 0).all(-1)
    logits = (q.to(wide) @ k.mT) * scale + times.log()
    lse = logits.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1)).exp()
    return (weights @ v).to(q.dtype), lse.masked_fill(empty, float("-inf"))


def _without(x: Tensor, allowed: Tensor, heads: int) -> Tensor:
    """Keys or values, one a query head, zero where none may take part."""
    return x.repeat_interleave(heads // x.shape[1], dim=1).masked_fill(~allowed.unsqueeze(-1), 0.0)
