"""The keys that agree best as their formula reads: all counts, then the largest of one number for slot and place."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def select(
    queries: Int[Tensor, "b h n p"],
    keys: Int[Tensor, "b h m p"],
    num_codes: int,
    count: int,
    steps: int,
    causal: bool,
    key_mask: Bool[Tensor, "b m"] | None,
) -> Int[Tensor, "b h n c"]:
    """See `attnlab.ops.code_agreement.agreeing_keys`."""
    n, m, parts = queries.shape[2], keys.shape[2], queries.shape[3]
    agree = (queries.unsqueeze(3) == keys.unsqueeze(2)).sum(-1)
    place = torch.arange(m, device=keys.device)
    rank = (agree // max(1, parts // (steps + 1))).clamp(max=steps) * m + (m - 1 - place)
    if key_mask is not None:
        rank = rank.masked_fill(~key_mask[:, None, None], -1)
    if causal:
        rank = rank.masked_fill(place > torch.arange(n, device=keys.device)[:, None], -1)
    best = rank.topk(count, dim=-1)
    return best.indices.masked_fill(best.values < 0, -1)
