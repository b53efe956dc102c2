"""Sliding windows that are cut at borders, as tiles: boxes of queries against the boxes of cells that their windows hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.core.grid import Grid
from attnlab.core.tilings import product, segments_of

SIDE = 8
"""Queries along an axis of a tile, at most."""


class SlidingBoxes(NamedTuple):
    """Tiles of a grid; all are of one kind.

    Args:
        queries: (t, x), cells; -1 for none. Every cell is a query once.
        keys: (t, y), likewise; -1 is also what lies outside of the grid.
        place: (x, y), where in the query's window the key stands, places in raster order; -1 for outside of the window.
    """

    queries: Int[Tensor, "t x"]
    keys: Int[Tensor, "t y"]
    place: Int[Tensor, "x y"]

    def bias(self, table: Float[Tensor, "h k"]) -> Float[Tensor, "h 1 x y"]:
        """A bias of the places of a window as one of the pairs of a tile, -inf for what no window holds."""
        place = self.place.to(table.device)
        return table[:, place.clamp(min=0)].masked_fill(place < 0, float("-inf")).unsqueeze(1)


def sliding_boxes(grid: Grid, window: Sequence[int], dilation: Sequence[int] | None = None) -> SlidingBoxes:
    """The tiles of windows of ``window`` cells, odd along each axis, ``dilation`` apart."""
    queries, keys, place = [], [], torch.zeros(1, 1, dtype=torch.int64)
    for size, width, step in zip(grid, window, dilation or (1,) * len(grid), strict=True):
        groups = min(step, size)
        count = -(-size // groups)
        side = min(SIDE, count)
        rows = segments_of(count, side)
        columns = segments_of(count, side + width - 1, step=side, start=-(width // 2))[: len(rows)]
        queries.append(_cells(rows, groups, size))
        keys.append(_cells(columns, groups, size))
        along = torch.arange(side + width - 1) - torch.arange(side)[:, None]
        along = along.masked_fill((along < 0) | (along >= width), -1)
        both = place[:, None, :, None] * width + along[:, None]
        place = both.masked_fill((place[:, None, :, None] < 0) | (along[:, None] < 0), -1).flatten(2).flatten(0, 1)
    return SlidingBoxes(product(queries, grid), product(keys, grid), place)


def _cells(places: Int[Tensor, "t x"], groups: int, size: int) -> Int[Tensor, "gt x"]:
    """Places of cells that are ``groups`` apart as cells of the axis, for each first cell."""
    cells = places * groups + torch.arange(groups)[:, None, None]
    return cells.masked_fill((places < 0) | (cells >= size), -1).flatten(0, 1)
