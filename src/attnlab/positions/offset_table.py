"""A learned bias for each offset on a grid, resized where the grid has another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.ops.attention import Pairwise
from attnlab.positions.base import Position, offsets_between, positions
from attnlab.positions.grid_offsets import spread

RESIZE_MODES = {1: "linear", 2: "bicubic", 3: "trilinear"}


@positions.register("offset_table", family="bias", paper="hat", partial=True)
class OffsetTable(Position):
    r"""A learned scalar a head and signed offset (Liu et al. 2021, Swin, equation 4; HAT, Chen et al. 2023, has it too).

    $$b_{hij} = B_h[\Delta_{ij}], \qquad \Delta_{ij} = \pm(p_i - p_j), \quad
      B_h \in \mathbb{R}^{(2M-1) \times \dots \times (2M-1)}$$

    A grid with other sides than M reads the table resized to 2 side - 1 on each axis (bicubic on images), as is done when
    trained windows are enlarged, or, by choice and where causal, its entries as they are and its ends for offsets beyond.

    Args:
        num_heads: heads, each with its own table.
        head_dim: width of a query; not used.
        size: M, the sides of the grid that the table belongs to.
        rank: of the grid.
        direction: "query_minus_key" or "key_minus_query", the order in which the table runs.
        other_sizes: what a grid of another size reads: the table "resized", or "clipped" offsets.

    Raises:
        ValueError: for a size below 2, or a rank, direction or other_sizes that is not known; in use, for a grid of another rank.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        size: int = 7,
        rank: int = 2,
        direction: str = "query_minus_key",
        other_sizes: str = "resized",
    ) -> None:
        super().__init__(num_heads, head_dim)
        if size < 2:
            raise ValueError(f"size: expected at least 2, got {size}")
        if rank not in RESIZE_MODES:
            raise ValueError(f"rank: expected one of {sorted(RESIZE_MODES)}, got {rank}")
        if direction not in ("query_minus_key", "key_minus_query"):
            raise ValueError(f"direction: expected 'query_minus_key' or 'key_minus_query', got {direction!r}")
        if other_sizes not in ("resized", "clipped"):
            raise ValueError(f"other_sizes: expected 'resized' or 'clipped', got {other_sizes!r}")
        self.size, self.rank, self.direction, self.other_sizes = size, rank, direction, other_sizes
        self.table = nn.Parameter(torch.empty(num_heads, *(2 * size - 1,) * rank))
        nn.init.trunc_normal_(self.table, std=0.02)

    def bias(self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None) -> Pairwise:
        """The scalars of the grid; a sequence is a grid of rank 1."""
        grid = self.grid_of_rank((num_keys,) if grid is None else grid, self.rank)
        table = self.table.to(q.dtype)
        if self.direction == "key_minus_query":
            table = table.flip(tuple(range(1, table.dim())))
        reach = self.size - 1
        if causal:
            # Resized to the length, the table would make an output depend on how many tokens follow.
            offsets = offsets_between(q.shape[2], num_keys, q.device)
            return Pairwise(offsets=table.flip(-1)[:, offsets.clamp(-reach, reach) + reach])
        sides = tuple(2 * side - 1 for side in grid)
        if table.shape[1:] != sides and self.other_sizes == "clipped":
            for axis, side in enumerate(grid, start=1):
                offsets = torch.arange(1 - side, side, device=q.device)
                table = table.index_select(axis, offsets.clamp(-reach, reach) + reach)
        elif table.shape[1:] != sides:
            table = F.interpolate(table[None], size=sides, mode=RESIZE_MODES[self.rank], align_corners=True)[0]
        return spread(table.flatten(1), grid, q.shape[2])
