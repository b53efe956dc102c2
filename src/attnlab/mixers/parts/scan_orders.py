"""Orders in which a mechanism of sequences visits the cells of a grid: exact permutations of any grid, with exact inverses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from attnlab.core.grid import Grid

Path = Int[Tensor, "n"]
Cell = tuple[int, int]


def raster(grid: Grid, axis: int = -1) -> Path:
    """Row by row, with ``axis`` the one that changes at every step; the order of the tokens themselves by default."""
    return torch.arange(math.prod(grid)).view(grid).movedim(axis, -1).reshape(-1)


def continuous(grid: Grid, axis: int = -1) -> Path:
    """Like `raster`, every second row backwards, so that each step is to a neighbour (a snake)."""
    sides = [*grid]
    sides.append(sides.pop(axis))
    path = raster(grid, axis).view(sides)
    while path.ndim > 1:
        odd = torch.arange(path.shape[-2]) % 2 == 1
        path = torch.where(odd[:, None], path.flip(-1), path).flatten(-2)
    return path


def windows(grid: Grid, side: int, axis: int = -1) -> Path:
    """Window by window of ``side`` cells an axis, and cell by cell in each; those at the far borders are smaller.

    Args:
        grid: sides of the grid.
        side: of a window.
        axis: the one that changes fastest, both among windows and within one.
    """
    order = [*range(len(grid))]
    order.append(order.pop(axis))
    cells = torch.arange(math.prod(grid))
    rank = torch.zeros_like(cells)
    places = torch.unravel_index(cells, grid)
    for within in (False, True):
        for a in order:
            count, place = (side, places[a] % side) if within else (-(-grid[a] // side), places[a] // side)
            rank = rank * count + place
    return rank.argsort()


def hilbert(grid: Grid) -> Path:
    """A curve that stays in a region until it has filled it.

    In two dimensions Hilbert's construction with halves that may be unequal, on any sides: every step is to a neighbour, but for
    at most one that is diagonal. In three and more the curve of the enclosing cube of a power of two (Hamilton and Rau-Chaplin
    2008), which passes over cells outside the grid.
    """
    sides = [side for side in grid if side > 1]
    if len(sides) < 2:
        return raster(grid)
    return _hilbert_index(sides).argsort() if len(sides) > 2 else torch.tensor(_curve(*sides))


def inverse(path: Path) -> Path:
    """Where on ``path`` each token stands."""
    return torch.empty_like(path).scatter_(0, path, torch.arange(len(path), device=path.device))


def visit(x: Shaped[Tensor, "b n *rest"], path: Path) -> Shaped[Tensor, "b n *rest"]:
    """The tokens, or their masks, in the order of ``path``; `inverse` brings them back."""
    return x.index_select(1, path)


def scan_paths(order: str, grid: Grid, *, window: int = 7, bidirectional: bool = False) -> list[Path]:
    """The paths of a named order on ``grid``; how many depends on its rank, and not on its sides.

    Args:
        order: "raster"; "cross" (VMamba: each axis in turn the fastest); "continuous" (likewise, as a snake); "hilbert";
            "windows" (LocalMamba: likewise, window by window); "spectral_spatial" (of a cube whose first axis are the bands: band
            by band, and cell by cell).
        grid: sides of the grid.
        window: side of a window.
        bidirectional: every path backwards too.

    Raises:
        ValueError: for an unknown order, a window below 1, or "spectral_spatial" on a grid that is no cube.
    """
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {sorted(ORDERS)}, got {order!r}")
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    if order == "spectral_spatial" and len(grid) != 3:
        raise ValueError(f"order: 'spectral_spatial' expects a grid (bands, height, width), got one of rank {len(grid)}")
    forward = ORDERS[order](grid, window)
    return forward + [path.flip(0) for path in forward] if bidirectional else forward


def _by_axis(path: Callable[[Grid, int], Path], grid: Grid) -> list[Path]:
    return [path(grid, axis) for axis in reversed(range(len(grid)))]


ORDERS: dict[str, Callable[[Grid, int], list[Path]]] = {
    "raster": lambda grid, window: [raster(grid)],
    "cross": lambda grid, window: _by_axis(raster, grid),
    "continuous": lambda grid, window: _by_axis(continuous, grid),
    "hilbert": lambda grid, window: [hilbert(grid)],
    "windows": lambda grid, window: _by_axis(lambda sides, axis: windows(sides, window, axis), grid),
    "spectral_spatial": lambda grid, window: [raster(grid), raster(grid, 0)],
}
"""The paths of each order by name, from the sides of a grid and of a window."""


def _curve(height: int, width: int) -> list[int]:
    """The walk over a rectangle from corner to corner along its longer side; kept, as it takes a loop over cells."""
    if (height, width) not in _CURVES:
        cells: list[Cell] = []
        across, down = (0, width), (height, 0)
        _fill(cells, (0, 0), *((across, down) if width >= height else (down, across)))
        _CURVES[height, width] = [row * width + column for row, column in cells]
    return _CURVES[height, width]


_CURVES: dict[tuple[int, int], list[int]] = {}


def _times(k: int, v: Cell) -> Cell:
    """A step of ``k`` cells in the direction of ``v``."""
    return k * ((v[0] > 0) - (v[0] < 0)), k * ((v[1] > 0) - (v[1] < 0))


def _plus(*vectors: Cell) -> Cell:
    return sum(v[0] for v in vectors), sum(v[1] for v in vectors)


def _half(length: int) -> int:
    """About half of it; even where that is possible, as a part of even length ends where the next one begins."""
    half = length // 2
    return half + 1 if half % 2 and length > 2 else half


def _fill(cells: list[Cell], start: Cell, along: Cell, aside: Cell) -> None:
    """Walk the rectangle that two vectors span, from the ``start`` corner to the one at the end of ``along``."""
    length, width = abs(sum(along)), abs(sum(aside))
    if width == 1 or length == 1:
        steps, direction = (length, along) if width == 1 else (width, aside)
        cells.extend(_plus(start, _times(k, direction)) for k in range(steps))
    elif 2 * length > 3 * width:  # two parts, one behind the other
        first = _half(length)
        _fill(cells, start, _times(first, along), aside)
        _fill(cells, _plus(start, _times(first, along)), _times(length - first, along), aside)
    else:  # away from the near side, along the far one, and back
        out, first = _half(width), length // 2
        _fill(cells, start, _times(out, aside), _times(first, along))
        _fill(cells, _plus(start, _times(out, aside)), along, _times(width - out, aside))
        corner = _plus(start, _times(length - 1, along), _times(out - 1, aside))
        _fill(cells, corner, _times(-out, aside), _times(first - length, along))


def _hilbert_index(sides: list[int]) -> Int[Tensor, "n"]:
    """Each cell's place on the Hilbert curve of the smallest cube of side 2^m around the grid."""
    rank = len(sides)
    full = 2**rank
    gray = [w ^ (w >> 1) for w in range(full)]
    ones = [((~w & (w + 1)).bit_length() - 1) % rank for w in range(full)]  # trailing ones, as axes
    entry = torch.tensor([0] + [gray[2 * ((w - 1) // 2)] for w in range(1, full)])
    turn = torch.tensor([0] + [ones[w if w % 2 else w - 1] for w in range(1, full)])
    rank_of = inverse(torch.tensor(gray))
    places = torch.unravel_index(torch.arange(math.prod(sides)), sides)
    corner = direction = index = torch.zeros_like(places[0])
    for bit in reversed(range((max(sides) - 1).bit_length())):
        octant = sum(((place >> bit) & 1) << axis for axis, place in enumerate(places))
        shift = direction + 1
        turned = octant ^ corner
        turned = ((turned >> shift) | (turned << (rank - shift))) & (full - 1)
        w = rank_of[turned]
        start = entry[w]
        corner = corner ^ (((start << shift) | (start >> (rank - shift))) & (full - 1))
        direction = (direction + turn[w] + 1) % rank
        index = (index << rank) | w
    return index
