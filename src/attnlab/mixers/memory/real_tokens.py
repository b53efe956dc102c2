"""Masked tokens as if they were not there: real ones one behind the other, and the last of them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.neural_memory import Alignment


def align(mask: Bool[Tensor, "b n"] | None) -> Alignment | None:
    """Slots for the real tokens from 0 on; None if all are real."""
    if mask is None:
        return None
    return Alignment.of(torch.zeros(mask.shape[0], dtype=torch.int64, device=mask.device), mask, mask.shape[1], 1)


def recent(
    past: Float[Tensor, "b w c"] | Bool[Tensor, "b w c"],
    new: Float[Tensor, "b n c"] | Bool[Tensor, "b n c"],
    count: Int[Tensor, "b"] | int,
) -> Float[Tensor, "b w c"] | Bool[Tensor, "b w c"]:
    """The last w entries of ``past`` and the first ``count`` of ``new``, in memory of their own."""
    both, size = torch.cat((past, new), 1), past.shape[1]
    if isinstance(count, int):
        return both[:, count : count + size].clone()
    index = count[:, None] + torch.arange(size, device=past.device)
    return both.gather(1, index.unsqueeze(-1).expand(-1, -1, both.shape[2]))
