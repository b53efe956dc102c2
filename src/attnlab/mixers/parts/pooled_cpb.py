"""Continuous position bias between the cells of a grid and the cells that it is pooled to."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.core.grid import Grid
from attnlab.positions.log_cpb import LogCPB, log_offsets


def _axis(side: int, cells: int, like: Tensor) -> tuple[slice, Int[Tensor, "side cells"]]:
    """Which rows of the half-cell offsets of an axis occur, and the one of each pair (cell, pooled cell)."""
    pooled = torch.arange(cells, device=like.device)
    # Adaptive pooling averages the cells floor(j side / cells) to ceil((j + 1) side / cells) - 1: twice their mean is whole.
    centres = pooled * side // cells + -(-(pooled + 1) * side // cells) - 1
    first, last = -(-side // cells) - 1, (cells - 1) * side // cells + side - 1
    step = 1 if side % cells else 2
    offsets = 2 * torch.arange(side, device=like.device)[:, None] - centres
    rows = slice(2 * side - 2 - last, 4 * side - 3 - first, step)
    return rows, (offsets + last) // step


class PooledCPB(LogCPB):
    r"""`LogCPB` from each cell of a 2-D grid to the centres of its pooled cells (Shi 2023, section 3.2).

    A centre is the mean of the coordinates that adaptive pooling averages. Every offset is evaluated once: about 4 n of them, not
    n times the pooled cells, where the pooled cells divide the grid.
    """

    def between(self, q: Float[Tensor, "b h n d"], grid: Grid, sides: tuple[int, int]) -> Float[Tensor, "1 h n p"]:
        """The biases from the grid's cells to those that it is pooled to."""
        # Half cells are the cells of a grid with 2 side - 1 of them.
        table = log_offsets(tuple(2 * side - 1 for side in grid), None if self.span is None else 2 * self.span - 1)
        table = table.view(*(4 * side - 3 for side in grid), 2)
        (rows, row), (columns, column) = (_axis(side, cells, q) for side, cells in zip(grid, sides, strict=True))
        used = table[rows, columns]
        index = row[:, None, :, None] * used.shape[1] + column[None, :, None, :]
        return self._values(used.flatten(0, 1), q)[:, index.flatten(0, 1).flatten(1)][None]
