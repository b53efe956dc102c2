"""Locally enhanced position: a depthwise convolution of the values beside the attention."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.masks import zero_masked
from attnlab.ops.convolutions import CONVOLUTIONS
from attnlab.positions.base import Position, positions


@positions.register("lepe", family="local", paper="cswin", partial=True)
class LocallyEnhancedPosition(Position):
    r"""LePE (Dong et al. 2021, CSWin, equation 7): head outputs plus a depthwise convolution of the values on the grid.

    $$O = \mathrm{attention}(Q, K, V) + \mathrm{DWConv}_k(V)$$

    Zero padding, with bias; masked tokens count as zero. It reads neighbours on all sides, so causal attention refuses it.

    Args:
        num_heads: heads of the attention.
        head_dim: width of a value.
        kernel_size: odd side of the window.
        rank: of the grid.

    Raises:
        ValueError: for an even window or an unknown rank; in use, for a grid of another rank.

    Differs from the paper: where windows cut the grid the convolution is cut with them only if the mixer says so; here it runs
    over the whole grid (as in BiFormer).
    """

    reads_future = reads_values = True

    def __init__(self, num_heads: int, head_dim: int, *, kernel_size: int = 3, rank: int = 2) -> None:
        super().__init__(num_heads, head_dim)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if rank not in (1, 2, 3):
            raise ValueError(f"rank: expected 1, 2 or 3, got {rank}")
        self.rank = rank
        width = num_heads * head_dim
        self.conv = CONVOLUTIONS[rank - 1](width, width, kernel_size, padding=kernel_size // 2, groups=width)

    def local(self, v: Float[Tensor, "b h m e"], grid: Grid | None, mask: Bool[Tensor, "b m"] | None) -> Float[Tensor, "b h m e"]:
        """The convolved values."""
        grid = self.grid_of_rank((v.shape[2],) if grid is None else grid, self.rank)
        tokens = zero_masked(v.transpose(1, 2).flatten(2), mask)
        return from_grid(self.conv(to_grid(tokens, grid))).unflatten(-1, (v.shape[1], v.shape[3])).transpose(1, 2)
