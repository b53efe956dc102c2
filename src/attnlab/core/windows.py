"""Windows of a grid as a rearrangement with an exact inverse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor

from attnlab.core.grid import Grid


@dataclass(frozen=True)
class Windows:
    """Non-overlapping windows of a grid; the grid is padded at the end of each axis to a multiple of the window.

    Args:
        grid: sides of the grid.
        window: sides of a window, one an axis.
    """

    grid: Grid
    window: Grid

    @property
    def counts(self) -> Grid:
        """Windows along each axis."""
        return tuple(-(-side // w) for side, w in zip(self.grid, self.window, strict=True))

    @property
    def padded(self) -> Grid:
        """Sides of the grid after padding."""
        return tuple(n * w for n, w in zip(self.counts, self.window, strict=True))

    def pad(self, x: Shaped[Tensor, "b n c"], value: float | bool = 0) -> Shaped[Tensor, "b p c"]:
        """Tokens of the grid to tokens of the padded grid, ``value`` in the new cells."""
        if self.padded == self.grid:
            return x
        extra = [full - side for side, full in zip(self.grid, self.padded, strict=True)]
        widths = [0, 0, *(width for after in reversed(extra) for width in (0, after))]
        return F.pad(x.reshape(x.shape[0], *self.grid, x.shape[2]), widths, value=value).flatten(1, -2)

    def crop(self, x: Shaped[Tensor, "b p c"]) -> Shaped[Tensor, "b n c"]:
        """The inverse of `pad`."""
        if self.padded == self.grid:
            return x
        x = x.reshape(x.shape[0], *self.padded, x.shape[2])
        for axis, side in enumerate(self.grid, start=1):
            x = x.narrow(axis, 0, side)
        return x.flatten(1, -2)

    def split(self, x: Shaped[Tensor, "b n c"]) -> Shaped[Tensor, "b w s c"]:
        """Tokens to (b, windows, tokens in a window, c); cells outside the grid are zero (False)."""
        rank, (b, _, c) = len(self.grid), x.shape
        sides = [part for n, w in zip(self.counts, self.window, strict=True) for part in (n, w)]
        order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
        return self.pad(x).reshape(b, *sides, c).permute(order).reshape(b, -1, math.prod(self.window), c)

    def merge(self, x: Shaped[Tensor, "b w s c"]) -> Shaped[Tensor, "b n c"]:
        """The inverse of `split`; cells outside the grid are dropped."""
        rank, b, c = len(self.grid), x.shape[0], x.shape[-1]
        order = [0, *(axis for i in range(rank) for axis in (1 + i, 1 + rank + i)), 1 + 2 * rank]
        return self.crop(x.reshape(b, *self.counts, *self.window, c).permute(order).reshape(b, -1, c))
