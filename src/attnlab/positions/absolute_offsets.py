"""Absolute offsets: a learned bias a head for how far apart two cells are on each axis, whichever comes first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.positions.base import Position, positions
from attnlab.positions.offset_table import RESIZE_MODES


@positions.register("absolute_offsets", family="bias")
class AbsoluteOffsets(Position):
    r"""A learned bias by absolute offset on a grid (Graham et al. 2021, LeViT).

    $$b_{hij} = B_h\big[\,|y_i - y_j|,\ |x_i - x_j|\,\big]$$

    It is symmetric: it knows distances, no direction. $B$ is 0 at first. A grid of a lower rank is one whose first sides are 1.
    A grid whose sides are longer than the table reads it resized to them, unless it is causal: then an output would depend on
    how many tokens follow, and farther offsets read the table's end.

    Args:
        num_heads: heads, each with its own table.
        head_dim: width of a query; not used.
        size: sides of the grid that the table belongs to; it has ``size ** rank`` entries a head.
        rank: of that grid, 1 to 3.

    Raises:
        ValueError: for a size below 1 or another rank; in use, for a grid of a higher rank.
    """

    def __init__(self, num_heads: int, head_dim: int, *, size: int = 7, rank: int = 2) -> None:
        super().__init__(num_heads, head_dim)
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        if rank not in RESIZE_MODES:
            raise ValueError(f"rank: expected one of {sorted(RESIZE_MODES)}, got {rank}")
        self.size, self.rank = size, rank
        self.table = nn.Parameter(torch.zeros(num_heads, *(size,) * rank))

    def bias(
        self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None
    ) -> Float[Tensor, "#b h n m"] | None:
        """The entries of all pairs (1, h, n, m)."""
        grid = (num_keys,) if grid is None else tuple(grid)
        if len(grid) > self.rank:
            raise ValueError(f"grid: position 'absolute_offsets' was built for rank {self.rank}, got {grid}")
        table = self.table.to(q.dtype)
        for _ in range(self.rank - len(grid)):
            table = table[:, 0]
        if max(grid) > self.size and not causal:
            sides = tuple(max(side, self.size) for side in grid)
            table = F.interpolate(table[None], size=sides, mode=RESIZE_MODES[len(grid)], align_corners=True)[0]
        axes = [torch.arange(side, device=q.device) for side in grid]
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
        offsets = (cells[num_keys - q.shape[2] :, None] - cells[None, :]).abs()
        entry = torch.zeros_like(offsets[..., 0])
        for axis, side in enumerate(table.shape[1:]):
            entry = entry * side + offsets[..., axis].clamp(max=side - 1)
        return table.flatten(1)[:, entry][None]
