"""Sliding-window attention as its definition reads, over all pairs of a query and a key: the oracle."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    key_mask: Bool[Tensor, "b m"] | None,
    left: int,
    right: int,
    num_sinks: int,
    scale: float,
) -> Float[Tensor, "b h n e"]:
    r"""$o_i = \sum_j w_{ij} v_j / \sum_j w_{ij}$ with $w_{ij} = e^{s\,\langle q_i, k_j\rangle}$ over the allowed keys.

    `sliding_window_attention` describes the arguments; a query without a key gives 0.
    """
    allowed = allowed_pairs(q.shape[2], k.shape[2], left, right, num_sinks, q.device)[None, None]
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
        # What stands at a masked key must not matter, and 0 * nan is not 0.
        k, v = (t.masked_fill(~key_mask[:, None, :, None], 0) for t in (k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = (scale * (q @ k.mT)).masked_fill(~allowed, -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min).detach()
    weights = torch.exp(scores - top)
    return (weights @ v) / weights.sum(-1, keepdim=True).clamp_min(1)


def allowed_pairs(
    queries: int, keys: int, left: int, right: int, num_sinks: int, device: torch.device | None = None
) -> Bool[Tensor, "n m"]:
    """Which key j each query at p = i + m - n may use: ``j <= p + right``, and ``j >= p - left`` or ``j < num_sinks``."""
    p = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)
    return (j <= p + right) & ((j >= p - left) | (j < num_sinks))
