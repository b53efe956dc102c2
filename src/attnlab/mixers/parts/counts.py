"""How many keys each query may use."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def key_counts(
    q: Float[Tensor, "b h n d"],
    num_keys: int,
    *,
    causal: bool,
    key_mask: Bool[Tensor, "b m"] | None,
    pair_mask: Bool[Tensor, "#b #h n m"] | None,
) -> Float[Tensor, "#b #h #n 1"]:
    """The number of allowed keys, at least 1, in q's dtype; only the dimensions on which it depends are there."""
    n = q.shape[2]
    if pair_mask is not None:
        allowed = pair_mask if key_mask is None else pair_mask & key_mask[:, None, None, :]
        count = (allowed.tril(num_keys - n) if causal else allowed).sum(dim=-1, keepdim=True)
    elif causal:
        seen = torch.arange(1, num_keys + 1, device=q.device)[None] if key_mask is None else key_mask.cumsum(dim=1)
        count = seen[:, None, num_keys - n :, None]
    elif key_mask is not None:
        count = key_mask.sum(dim=1)[:, None, None, None]
    else:
        count = torch.full((1, 1, 1, 1), num_keys, device=q.device)
    return count.clamp(min=1).to(q.dtype)
