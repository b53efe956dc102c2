"""Absolute offsets: a learned bias a head for how far apart two cells are on each axis, whichever comes first."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.positions.base import Position, positions


@positions.register("absolute_offsets", family="bias")
class AbsoluteOffsets(Position):
    r"""A learned bias by absolute offset on a grid (Graham et al. 2021, LeViT).

    $$b_{hij} = B_h\big[\,|y_i - y_j|,\ |x_i - x_j|\,\big]$$

    It is symmetric: it knows distances, no direction. $B$ is 0 at first. A grid of a lower rank is one whose first sides are 1.

    Args:
        num_heads: heads, each with its own table.
        head_dim: width of a query; not used.
        size: sides of the largest grid; the table has ``size ** rank`` entries a head.
        rank: of that grid.

    Raises:
        ValueError: for a size or rank below 1; for a grid that the table does not reach.
    """

    def __init__(self, num_heads: int, head_dim: int, *, size: int = 7, rank: int = 2) -> None:
        super().__init__(num_heads, head_dim)
        if size < 1 or rank < 1:
            raise ValueError(f"size, rank: expected at least 1, got {size} and {rank}")
        self.size, self.rank = size, rank
        self.table = nn.Parameter(torch.zeros(num_heads, *(size,) * rank))

    def bias(
        self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None
    ) -> Float[Tensor, "#b h n m"] | None:
        """The entries of all pairs (1, h, n, m); ValueError for a grid larger than the table."""
        grid = (num_keys,) if grid is None else tuple(grid)
        if len(grid) > self.rank or max(grid) > self.size:
            raise ValueError(
                f"grid: position 'absolute_offsets' was built for at most {self.rank} sides of up to size={self.size}, got {grid}"
            )
        table = self.table.to(q.dtype)
        for _ in range(self.rank - len(grid)):
            table = table[:, 0]
        axes = [torch.arange(side, device=q.device) for side in grid]
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
        offsets = (cells[num_keys - q.shape[2] :, None] - cells[None, :]).abs()
        strides = torch.tensor([self.size**axis for axis in reversed(range(len(grid)))], device=q.device)
        return table.flatten(1)[:, (offsets * strides).sum(dim=-1)][None]
