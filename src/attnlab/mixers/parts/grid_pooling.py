"""Adaptive pooling of a grid to fewer cells, over its real cells."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.grid import Grid, to_grid


def pool_grid(
    x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, grid: Grid, sides: tuple[int, int]
) -> tuple[Float[Tensor, "b a c"], Bool[Tensor, "b a"] | None]:
    """Adaptive average pooling of the real cells of a 2-D grid to ``sides``, and which pooled cells have any.

    ``x`` must be zero at masked cells.
    """
    mean = F.adaptive_avg_pool2d(to_grid(x, grid), sides).flatten(2).transpose(1, 2)
    if mask is None:
        return mean, None
    share = F.adaptive_avg_pool2d(to_grid(mask.unsqueeze(-1).to(x.dtype), grid), sides).flatten(2).transpose(1, 2)
    return mean / share.masked_fill(share == 0, 1.0), share.squeeze(-1) > 0
