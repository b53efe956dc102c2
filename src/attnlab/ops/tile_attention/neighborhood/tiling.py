"""A neighbourhood as tiles: boxes of queries against the box of all keys that any of them sees."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnlab.core.tilings import product
from attnlab.ops.neighborhoods import Axis

SIDES = {1: 64, 2: 8, 3: 4}
"""Queries along an axis of a tile, at most, by the number of axes."""


class Tiles(NamedTuple):
    """Tiles of one axis, or of a grid: tiles t, queries x, keys y, kinds of tile c.

    Args:
        queries: (t, x), cells; -1 for none.
        keys: (t, y), likewise.
        kind: (t,).
        allowed: (c, x, y), which pairs of a kind of tile are visible.
        offsets: (c, x, y, axes), key less query along each axis, in steps of its dilation.
    """

    queries: Int[Tensor, "t x"]
    keys: Int[Tensor, "t y"]
    kind: Int[Tensor, "t"]
    allowed: Bool[Tensor, "c x y"]
    offsets: Int[Tensor, "c x y axes"]


@functools.lru_cache(maxsize=64)
def tiles_of(axes: tuple[Axis, ...]) -> Tiles:
    """The tiles of a grid: products of those of its axes."""
    parts = [_axis_tiles(axis, SIDES.get(len(axes), 4)) for axis in axes]
    found = parts[0]
    for axis, part in zip(axes[1:], parts[1:], strict=True):
        found = _product(found, part, axis.size)
    return found


def _axis_tiles(axis: Axis, side: int) -> Tiles:
    side = min(math.ceil(side / axis.stride) * axis.stride, -(-axis.size // axis.dilation))
    pieces = []
    for cells in axis.groups():
        first, last = axis.reach(len(cells))
        pieces += [
            (cells, first[start : start + side], last[start : start + side], start) for start in range(0, len(cells), side)
        ]
    width = max(int(last.max() - first.min()) + 1 for _, first, last, _ in pieces)
    queries, keys = torch.full((len(pieces), side), -1), torch.full((len(pieces), width), -1)
    allowed, offsets = (
        torch.zeros(len(pieces), side, width, dtype=torch.bool),
        torch.zeros(len(pieces), side, width, dtype=torch.int64),
    )
    for number, (cells, first, last, start) in enumerate(pieces):
        begin = max(0, min(int(first.min()), len(cells) - width))
        seen = torch.arange(begin, min(begin + width, len(cells)))
        count = len(first)
        queries[number, :count] = cells[start : start + count]
        keys[number, : len(seen)] = cells[seen]
        allowed[number, :count, : len(seen)] = (seen >= first[:, None]) & (seen <= last[:, None])
        place = torch.arange(start, start + count)
        offsets[number, :count, : len(seen)] = (seen - place[:, None]).where(allowed[number, :count, : len(seen)], 0)
    # tiles in the middle are all of one kind
    both = torch.stack((allowed.long(), offsets)).transpose(0, 1).flatten(1)
    kinds, kind = torch.unique(both, dim=0, return_inverse=True)
    kinds = kinds.view(len(kinds), 2, side, width)
    return Tiles(queries, keys, kind, kinds[:, 0].bool(), kinds[:, 1].unsqueeze(-1))


def _product(rows: Tiles, columns: Tiles, size: int) -> Tiles:
    """Tiles of a grid with one axis more, of ``size`` cells."""
    kinds = len(columns.allowed)
    allowed = torch.einsum("axy,buv->abxuyv", rows.allowed.byte(), columns.allowed.byte()).bool()
    shape = (len(rows.allowed) * kinds, allowed.shape[2] * allowed.shape[3], allowed.shape[4] * allowed.shape[5])
    first = rows.offsets[:, None, :, None, :, None].expand(*allowed.shape, -1)
    second = columns.offsets[None, :, None, :, None].expand(*allowed.shape, -1)
    return Tiles(
        product((rows.queries, columns.queries), (1, size)),
        product((rows.keys, columns.keys), (1, size)),
        (rows.kind[:, None] * kinds + columns.kind).flatten(),
        allowed.reshape(shape),
        torch.cat((first, second), dim=-1).reshape(*shape, -1),
    )


def table_index(offsets: Int[Tensor, "c x y axes"], windows: Sequence[int]) -> Int[Tensor, "c x y"]:
    """Where each pair's bias stands in a flat table of 2 w - 1 offsets an axis, -(w - 1) first."""
    index = torch.zeros_like(offsets[..., 0])
    for axis, window in enumerate(windows):
        index = index * (2 * window - 1) + offsets[..., axis] + window - 1
    return index
