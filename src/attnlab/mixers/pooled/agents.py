"""How queries are pooled into agents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.grid import Grid, to_grid


def segment_membership(mask: Bool[Tensor, "b n"], count: int) -> Bool[Tensor, "b a n"]:
    """Which of the real tokens belong to each of ``count`` adaptive segments of a sequence.

    Of c real tokens, segment a holds those of rank floor(a c / count) to ceil((a + 1) c / count) - 1, as adaptive pooling
    does, so that padding anywhere leaves the segments what they are without it.
    """
    rank = mask.cumsum(dim=1) - 1
    total = mask.sum(dim=1)[:, None]
    index = torch.arange(count, device=mask.device)[None]
    first = (index * total).div(count, rounding_mode="floor")
    last = -(-(index + 1) * total).div(count, rounding_mode="floor")
    inside = (rank[:, None] >= first.unsqueeze(-1)) & (rank[:, None] < last.unsqueeze(-1))
    return inside & mask[:, None]


def pool_sequence(
    x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, count: int
) -> tuple[Float[Tensor, "b a c"], Bool[Tensor, "b a"] | None]:
    """Adaptive average pooling of the real tokens to ``count`` agents, and which agents have any token."""
    if mask is None:
        return F.adaptive_avg_pool1d(x.transpose(1, 2), count).transpose(1, 2), None
    member = segment_membership(mask, count)
    size = member.sum(dim=-1, keepdim=True)
    return (member.to(x.dtype) @ x) / size.clamp(min=1).to(x.dtype), size.squeeze(-1) > 0


def pool_grid(
    x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, grid: Grid, sides: tuple[int, int]
) -> tuple[Float[Tensor, "b a c"], Bool[Tensor, "b a"] | None]:
    """Adaptive average pooling of the real cells of a 2-D grid to ``sides``, and which agents have any."""
    mean = F.adaptive_avg_pool2d(to_grid(x, grid), sides).flatten(2).transpose(1, 2)
    if mask is None:
        return mean, None
    share = F.adaptive_avg_pool2d(to_grid(mask.unsqueeze(-1).to(x.dtype), grid), sides).flatten(2).transpose(1, 2)
    return mean / share.masked_fill(share == 0, 1.0), share.squeeze(-1) > 0
