"""Grids stay flat in the token dimension: (batch, prod(grid), channels), row-major."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

Grid = tuple[int, ...]


def resolve_grid(grid: Grid | None, num_tokens: int) -> Grid:
    """The grid, or ``(num_tokens,)`` for None.

    Raises:
        TypeError: if it is not a tuple or list of integers.
        ValueError: if a side is not positive or the product is not ``num_tokens``.
    """
    if grid is None:
        return (num_tokens,)
    if not isinstance(grid, (tuple, list)) or not all(isinstance(side, int) for side in grid):
        raise TypeError(f"grid: expected a tuple of integers such as (height, width), got {grid!r}")
    if not grid or any(side < 1 for side in grid) or math.prod(grid) != num_tokens:
        raise ValueError(f"grid: expected positive sides with product {num_tokens} (the tokens of x), got {tuple(grid)}")
    return tuple(grid)


def to_grid(x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b c *grid"]:
    """Tokens to a channels-first image, volume or signal."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)


def from_grid(x: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b n c"]:
    """The inverse of `to_grid`."""
    return x.flatten(2).transpose(1, 2)
