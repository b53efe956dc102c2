"""What a tiled kernel can gain from a neighbourhood: pairs that are seen, and pairs of tiles that hold one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from attnlab.ops.neighborhoods import Axis, axes_of


@dataclass(frozen=True)
class Prediction:
    """Counts for one grid, rule and tiling, from which the bounds of the speed-up over dense attention follow.

    Args:
        tokens: cells of the grid.
        visible_pairs: pairs of query and key that are seen.
        tile_pairs: pairs of a query tile and a key tile that hold one of them, tiles being boxes of the grid.
        all_tile_pairs: pairs of such tiles.
        flat_tile_pairs: the same where tiles are runs of as many tokens in row-major order.
        all_flat_tile_pairs: pairs of those.
        tile_size: pairs of query and key that two tiles have.
    """

    tokens: int
    visible_pairs: int
    tile_pairs: int
    all_tile_pairs: int
    flat_tile_pairs: int
    all_flat_tile_pairs: int
    tile_size: int

    @property
    def by_flops(self) -> float:
        """The bound if only what is seen were computed: all pairs over seen ones."""
        return self.tokens**2 / self.visible_pairs

    @property
    def by_tiles(self) -> float:
        """The bound where whole tiles are computed or skipped, and tiles are boxes of the grid."""
        return self.all_tile_pairs / self.tile_pairs

    @property
    def by_flat_tiles(self) -> float:
        """The same where tiles are runs of the flat grid."""
        return self.all_flat_tile_pairs / self.flat_tile_pairs

    @property
    def waste(self) -> float:
        """Share of the computed pairs that are not seen, boxes of the grid being the tiles; places beyond the grid count."""
        return 1 - self.visible_pairs / (self.tile_pairs * self.tile_size)

    @property
    def perfectly_block_sparse(self) -> bool:
        """Whether every pair that boxes of the grid compute is seen, so that no kernel needs a mask."""
        return self.visible_pairs == self.tile_pairs * self.tile_size


def predict_speedup(
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    query_tile: int | Sequence[int],
    key_tile: int | Sequence[int],
) -> Prediction:
    r"""Count tiles as the simulator of Hassani et al. 2025 (arXiv 2504.16922, section 3) does; no kernel runs.

    A kernel computes a pair of tiles wholly if any query of the one sees any key of the other, and skips it otherwise. With a
    stride of the query tile's side, and a window that is a multiple of the key tile's, on sides that both tiles divide, no pair
    is computed in vain and the bound by tiles is that by FLOPs, if windows begin at key tiles' edges, too: as many tiles before
    the leader's as after it, so an odd number of the query tile's, or key tiles of half its side.

    Visibility is a product over axes, and so is the count for boxes; for runs of the flat grid pairs are counted a row of tiles
    at a time: time O(n^2), memory O(n tile).

    Args:
        grid: sides of the grid.
        window: see `neighborhood_attention`.
        stride: see there.
        dilation: see there; cells of a dilation group are neighbours for the tiles, as the kernels arrange them.
        causal: see there.
        query_tile: sides of a box of queries; one number, or one an axis. The product is the length of a run.
        key_tile: sides of a box of keys, likewise.

    Raises:
        ValueError: for rules that do not fit the grid, or tiles of other numbers of sides, or below 1.
    """
    axes = axes_of(grid, window, stride, dilation, causal)
    queries, keys = _sides("query_tile", query_tile, len(axes)), _sides("key_tile", key_tile, len(axes))
    pairs, tiles, possible = 1, 1, 1
    for axis, x, y in zip(axes, queries, keys, strict=True):
        seen, used, count = _along(axis, x, y)
        pairs, tiles, possible = pairs * seen, tiles * used, possible * count
    flat, all_flat = _flat(axes, math.prod(queries), math.prod(keys))
    size = math.prod(queries) * math.prod(keys)
    return Prediction(math.prod(grid), pairs, tiles, possible, flat, all_flat, size)


def _sides(name: str, tile: int | Sequence[int], rank: int) -> tuple[int, ...]:
    sides = (tile,) * rank if isinstance(tile, int) else tuple(tile)
    if len(sides) != rank or min(sides) < 1:
        raise ValueError(f"{name}: expected one positive number, or one for each of {rank} axes, got {tile}")
    return sides


def _along(axis: Axis, query_side: int, key_side: int) -> tuple[int, int, int]:
    """Seen pairs of one axis, pairs of segments that hold one, and all pairs of segments."""
    order = torch.cat(list(axis.groups()))
    queries, keys = (_segments(axis, side) for side in (query_side, key_side))
    seen = axis.visible()[order][:, order]
    rows = torch.zeros(int(queries.max()) + 1, axis.size).index_add_(0, queries, seen.float())
    used = torch.zeros(rows.shape[0], int(keys.max()) + 1).index_add_(1, keys, rows)
    return int(seen.sum()), int((used > 0).sum()), used.numel()


def _segments(axis: Axis, side: int) -> Tensor:
    """The segment of each cell, cells ordered by dilation group: no segment holds cells of two groups."""
    found, before = [], 0
    for cells in axis.groups():
        found.append(before + torch.arange(len(cells)) // side)
        before += -(-len(cells) // side)
    return torch.cat(found)


def _flat(axes: Sequence[Axis], query_run: int, key_run: int) -> tuple[int, int]:
    """Pairs of runs of the flat grid that hold a seen pair, and all pairs of runs."""
    n = math.prod(axis.size for axis in axes)
    key_segment = torch.arange(n) // key_run
    visible = [axis.visible() for axis in axes]
    used = 0
    for start in range(0, n, query_run):
        seen = _rows(visible, torch.arange(start, min(start + query_run, n))).any(0).float()
        used += int((torch.zeros(-(-n // key_run)).index_add_(0, key_segment, seen) > 0).sum())
    return used, -(-n // query_run) * -(-n // key_run)


def _rows(visible: Sequence[Bool[Tensor, "_ _"]], cells: Tensor) -> Bool[Tensor, "q n"]:
    """Which cells of the grid some of its cells see."""
    found = torch.ones(len(cells), 1, dtype=torch.bool)
    stride = math.prod(len(seen) for seen in visible)
    for seen in visible:
        stride //= len(seen)
        along = seen[cells // stride % len(seen)]
        found = (found.unsqueeze(2) & along.unsqueeze(1)).flatten(1)
    return found
