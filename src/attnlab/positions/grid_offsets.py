"""Offsets between the cells of a grid, each once, and which pair of cells has which."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.core.grid import Grid
from attnlab.ops.attention import Pairwise


def unique_offsets(grid: Grid, device: torch.device) -> Int[Tensor, "u r"]:
    """All offsets, query minus key: -(side - 1) to side - 1 on each axis, row-major."""
    axes = [torch.arange(1 - side, side, device=device) for side in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def offset_index(grid: Grid, device: torch.device) -> Int[Tensor, "n n"]:
    """The row of `unique_offsets` that belongs to each pair (query, key)."""
    axes = [torch.arange(side, device=device) for side in grid]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    strides: list[int] = []
    step = 1
    for side in reversed(grid):
        strides.insert(0, step)
        step *= 2 * side - 1
    shift = torch.tensor([side - 1 for side in grid], device=device)
    return ((cells[:, None] - cells[None, :] + shift) * torch.tensor(strides, device=device)).sum(dim=-1)


def spread(values: Float[Tensor, "h u"], grid: Grid, num_queries: int) -> Pairwise:
    """A bias from one value a head and unique offset: by offset on a line, for its last queries; dense on other grids."""
    if len(grid) == 1:
        return Pairwise(offsets=values.flip(-1)[:, : num_queries + grid[0] - 1])  # rows run by key minus query
    return Pairwise(dense=values[:, offset_index(grid, values.device)][None])
