"""Aggregation over neighbourhoods as its formula reads: a table of the cells of every window."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.ops.aggregation.runs import Window
from attnlab.ops.neighborhoods import Axis


def gather(weights: Float[Tensor, "b h m k"], v: Float[Tensor, "b h n e"], axes: Sequence[Window]) -> Float[Tensor, "b h m e"]:
    """Each query sums the cells of its window by its weights."""
    table = cells(axes).to(v.device)
    return torch.einsum("bhmk,bhmke->bhme", weights.masked_fill(table < 0, 0.0), v[:, :, table.clamp(min=0)])


def spread(weights: Float[Tensor, "b h m k"], u: Float[Tensor, "b h m e"], axes: Sequence[Window]) -> Float[Tensor, "b h n e"]:
    """Each query adds itself to the cells of its window by its weights."""
    table = cells(axes).to(u.device)
    size = 1
    for axis in axes:
        size *= axis.size
    parts = (weights.masked_fill(table < 0, 0.0).unsqueeze(-1) * u.unsqueeze(3)).flatten(2, 3)
    return u.new_zeros(*u.shape[:2], size, u.shape[3]).index_add(2, table.clamp(min=0).flatten(), parts)


def cells(axes: Sequence[Window]) -> Int[Tensor, "m k"]:
    """The cells of each query's window, queries and places in raster order; -1 for none."""
    along = [[_cells_of(axis, query) for query in range(axis.queries)] for axis in axes]
    rows = []
    for lists in itertools.product(*along):
        row = []
        for places in itertools.product(*lists):
            number = 0
            for place, axis in zip(places, axes, strict=True):
                number = -1 if number < 0 or place < 0 else number * axis.size + place
            row.append(number)
        rows.append(row)
    return torch.tensor(rows)


def _cells_of(axis: Window, query: int) -> list[int]:
    """The cells that one query of an axis reads."""
    if axis.shifted:
        return torch.nonzero(Axis(axis.size, axis.width, 1, axis.dilation).visible()[query]).flatten().tolist()
    center = query * axis.stride
    around = [center + (place - axis.width // 2) * axis.dilation for place in range(axis.width)]
    return [cell if 0 <= cell < axis.size else -1 for cell in around]
