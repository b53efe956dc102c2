"""The mean over a node's neighbours, all of them or a random sample."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def sampled(neighbors: Bool[Tensor, "*s n m"], count: int, generator: torch.Generator | None = None) -> Bool[Tensor, "*s n m"]:
    """At most ``count`` neighbours of each node, all choices alike probable."""
    if count >= neighbors.shape[-1]:
        return neighbors
    order = torch.rand(neighbors.shape, generator=generator, device=neighbors.device).masked_fill(~neighbors, 2.0)
    best = order.topk(count, dim=-1, largest=False).indices
    return torch.zeros_like(neighbors).scatter(-1, best, True) & neighbors


def neighbor_mean(x: Float[Tensor, "b h n d"], neighbors: Bool[Tensor, "#b #h m n"]) -> Float[Tensor, "b h m d"]:
    """The mean of the tokens that each row marks, 0 where it marks none."""
    number = neighbors.sum(-1, keepdim=True).clamp(min=1)
    return neighbors.to(x.dtype) @ x / number.to(x.dtype)
