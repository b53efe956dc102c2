"""What routers share, whatever they route to."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def top_k_mask(scores: Float[Tensor, "*s r"], k: int) -> Bool[Tensor, "*s r"]:
    """True at the k largest of each row; of equal ones the first."""
    chosen = scores.topk(k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
