"""The cells of a grid sorted into tiles: boxes that may overlap or reach beyond the grid, and interleaved cells.

A tiling is a table (tiles, places) of cells, row-major in the grid; -1 stands for no cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def segments_of(size: int, side: int, *, step: int | None = None, start: int = 0) -> Int[Tensor, "t x"]:
    """Segments of one axis, -1 beyond its ends, so many that every cell from ``start`` on is in a step of one.

    Args:
        size: cells along the axis.
        side: cells of a segment.
        step: from the beginning of a segment to that of the next; by default ``side``, so that none overlap.
        start: where the first begins; below 0 it begins before the axis.

    Raises:
        ValueError: for a side or step below 1.
    """
    step = side if step is None else step
    if side < 1 or step < 1:
        raise ValueError(f"side, step: expected at least 1, got {side} and {step}")
    firsts = torch.arange(start, size, step)
    cells = firsts[:, None] + torch.arange(side)
    return cells.masked_fill((cells < 0) | (cells >= size), -1)


def interleaved(size: int, interval: int) -> Int[Tensor, "t x"]:
    """One axis, the cells ``interval`` apart in a tile; the longest tile sets the number of places."""
    if interval < 1:
        raise ValueError(f"interval: expected at least 1, got {interval}")
    cells = torch.arange(min(interval, size))[:, None] + interval * torch.arange(-(-size // interval))
    return cells.masked_fill(cells >= size, -1)


def product(tilings: Sequence[Int[Tensor, "..."]], sizes: Sequence[int]) -> Int[Tensor, "t x"]:
    """Tiles of a grid from tiles of its axes: one for each combination, with the cells of all combinations of places."""
    found = tilings[0]
    for axis, size in zip(tilings[1:], sizes[1:], strict=True):
        cells = found[:, None, :, None] * size + axis[:, None]
        nobody = (found < 0)[:, None, :, None] | (axis < 0)[:, None]
        found = cells.masked_fill(nobody, -1).flatten(2).flatten(0, 1)
    return found


def boxes(
    grid: Sequence[int], sides: Sequence[int], *, steps: Sequence[int] | None = None, starts: Sequence[int] | None = None
) -> Int[Tensor, "t x"]:
    """Boxes of a grid, axis by axis as `segments_of`: windows, shifted windows, and windows that overlap."""
    steps = sides if steps is None else steps
    starts = (0,) * len(grid) if starts is None else starts
    axes = [segments_of(n, side, step=step, start=start) for n, side, step, start in zip(grid, sides, steps, starts, strict=True)]
    return product(axes, grid)


def lattices(grid: Sequence[int], intervals: Sequence[int]) -> Int[Tensor, "t x"]:
    """Cells that are a whole number of intervals apart along each axis."""
    return product([interleaved(n, interval) for n, interval in zip(grid, intervals, strict=True)], grid)
