"""Causal mechanisms on a grid, run from its corners: copies flipped along some axes, and the way back."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

Axes = tuple[int, ...]


def corners(rank: int) -> list[Axes]:
    """The axes to be flipped for each corner, counted from the last: none, all, then the last axes first.

    In 2-D: none, both, the width, the height.
    """
    every = [axes for size in range(1, rank) for axes in itertools.combinations(range(-1, -rank - 1, -1), size)]
    return [(), tuple(range(-1, -rank - 1, -1)), *every]


def from_corners(x: Float[Tensor, "b c *grid"], flips: list[Axes]) -> Float[Tensor, "db c *grid"]:
    """The copies along the batch, a corner after the other."""
    return torch.cat([x.flip(axes) if axes else x for axes in flips])


def to_one_corner(x: Float[Tensor, "db c *grid"], flips: list[Axes]) -> list[Float[Tensor, "b c *grid"]]:
    """The inverse: a tensor a corner, every place where it was."""
    return [part.flip(axes) if axes else part for part, axes in zip(x.chunk(len(flips)), flips, strict=True)]
