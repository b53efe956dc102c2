"""Adaptive segments of the real tokens of a sequence."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def segment_means(real: Bool[Tensor, "b n"], count: int, dtype: torch.dtype) -> Float[Tensor, "b s n"]:
    """The mean over each of ``count`` segments as a matrix.

    Of c real tokens, segment s holds those of rank floor(s c / count) to ceil((s + 1) c / count) - 1, as adaptive pooling
    does, so that padding anywhere leaves the segments what they are without it. Without any real token all rows are 0.
    """
    rank, total = real.cumsum(dim=1)[:, None] - 1, real.sum(dim=1)[:, None, None]
    segment = torch.arange(count, device=real.device)[None, :, None]
    first = (segment * total).div(count, rounding_mode="floor")
    end = -(-(segment + 1) * total).div(count, rounding_mode="floor")
    inside = (rank >= first) & (rank < end) & real[:, None]
    return inside.to(dtype) / inside.sum(dim=-1, keepdim=True).clamp(min=1).to(dtype)
