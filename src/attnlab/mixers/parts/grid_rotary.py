"""Rotary position on a grid: each axis turns its own share of the channels."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.ops.backends import accumulate_dtype
from attnlab.positions.rotary import rotate


class GridRotary(nn.Module):
    r"""Adjacent channel pairs turned by an angle that grows along one axis (RAVLT and MAViT's 2-D form of Su et al. 2021).

    Of d channels axis a turns the a-th part of $d / r$, r the rank. With p = d / 2r pairs in a part, pair t turns by

    $$\theta_t = \mathrm{base}^{-t/(p-1)}, \quad t = 0 \dots p - 1$$

    a cell: both ends of the range are in use. It has no parameters.

    Args:
        head_dim: d, a multiple of 2 r.
        rank: r, of the grid.
        base: ratio of the largest angle to the smallest.

    Raises:
        ValueError: for a width that the axes cannot share.
    """

    def __init__(self, head_dim: int, *, rank: int = 2, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim % (2 * rank):
            raise ValueError(f"head_dim: expected a multiple of {2 * rank} (a pair for each of {rank} axes), got {head_dim}")
        self.pairs, self.base = head_dim // (2 * rank), base

    def angles(self, grid: Grid, like: Tensor) -> Float[Tensor, "n p"]:
        """The angles of all cells, row-major, on the device of ``like`` and in float32 or wider."""
        place: dict[str, Any] = {"device": like.device, "dtype": accumulate_dtype(like.dtype)}
        steps = self.base ** -torch.linspace(0, 1, self.pairs, **place)
        axes = torch.meshgrid(*(torch.arange(side, **place) for side in grid), indexing="ij")
        return rearrange([axis.flatten()[:, None] * steps for axis in axes], "axes n p -> n (axes p)")

    def forward(self, x: Float[Tensor, "b h n d"], grid: Grid) -> Float[Tensor, "b h n d"]:
        """``x`` turned by the angles of its cells."""
        return rotate(x, self.angles(grid, x)[None], interleaved=True)
