"""What routers share, whatever they route to."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def top_k_mask(scores: Float[Tensor, "*s r"], k: int) -> Bool[Tensor, "*s r"]:
    """True at the k largest of each row; of equal ones the first."""
    chosen = scores.topk(k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


def balance_loss(
    scores: Float[Tensor, "b n r"], chosen: Bool[Tensor, "b n r"], mask: Bool[Tensor, "b n"] | None
) -> Float[Tensor, ""]:
    r"""Load balance $E^2\,\mathrm{mean}_e(\bar p_e \bar f_e)$: mean score times share of tokens, over E heads."""
    real = torch.ones_like(chosen[..., 0]) if mask is None else mask
    weight = real.to(scores.dtype).unsqueeze(-1) / real.sum().clamp(min=1)
    share = (scores * weight).sum(dim=(0, 1)) * (chosen.to(scores.dtype) * weight).sum(dim=(0, 1))
    return share.mean() * scores.shape[-1] ** 2
