"""Shuffling of entities that have no order, as an augmentation."""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor


def permute_entities(
    x: Shaped[Tensor, "b *s"], *, dim: int = -1, generator: torch.Generator | None = None
) -> Shaped[Tensor, "b *s"]:
    """``x`` with the entries along ``dim`` in a random order of each example's own (Wen et al. 2023, entity rearrangement).

    Args:
        x: a batch, such as skeleton clips (b, channels, frames, joints, entities).
        dim: the axis of the entities, not the first.
        generator: what the orders are drawn from, on its own device; by default torch's own.

    Raises:
        ValueError: for an axis that there is not, or the batch's.
    """
    if not -x.dim() < dim < x.dim() or dim == 0:
        raise ValueError(f"dim: expected an axis of {x.dim()} other than the first, got {dim}")
    device = x.device if generator is None else generator.device
    order = torch.rand(x.shape[0], x.shape[dim], generator=generator, device=device).argsort(dim=1).to(x.device)
    shape = [1] * x.dim()
    shape[0], shape[dim] = order.shape
    return x.gather(dim, order.view(shape).expand_as(x))
