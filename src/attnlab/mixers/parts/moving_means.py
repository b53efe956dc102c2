"""Means of assigned vectors that move on by batches: what codebooks and centroids share."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def assigned(
    x: Float[Tensor, "b h n d"], codes: Int[Tensor, "b h n"], size: int, mask: Bool[Tensor, "b n"] | None
) -> tuple[Float[Tensor, "h s"], Float[Tensor, "h s d"]]:
    """How many real vectors of a batch have each of ``size`` codes, and their sum, in the dtype of x."""
    hot = F.one_hot(codes, size).to(x.dtype)
    if mask is not None:
        hot = hot * mask[:, None, :, None]
    return hot.sum((0, 2)), (hot.mT @ x).sum(0)


def smoothed_means(counts: Float[Tensor, "h s"], sums: Float[Tensor, "h s d"], eps: float) -> Float[Tensor, "h s d"]:
    r"""$M_c / \tilde N_c$, where $\tilde N_c = N (N_c + \epsilon) / (N + S \epsilon)$ and $N = \sum_c N_c$; new memory."""
    total = counts.sum(-1, keepdim=True)
    smooth = total * (counts + eps) / (total + counts.shape[1] * eps)
    return sums / smooth.unsqueeze(-1)
