r"""Aggregation over neighbourhoods of a grid with given weights, and its adjoint: no scores of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from attnlab.ops.aggregation import eager, reference
from attnlab.ops.aggregation.folding import fold_kernels
from attnlab.ops.aggregation.runs import Window, windows_of
from attnlab.ops.backends import Op, accumulate_dtype
from attnlab.ops.chunks import common_dtype

__all__ = ["OP", "SPREAD", "fold_kernels", "neighborhood_aggregation", "neighborhood_scatter"]

OP = Op("aggregation", {"reference": reference.gather, "eager": eager.gather})
"""The implementations of `neighborhood_aggregation`, which take the rules of all axes."""

SPREAD = Op("scatter", {"reference": reference.spread, "eager": eager.spread})
"""The implementations of `neighborhood_scatter`, likewise."""


def neighborhood_aggregation(
    weights: Float[Tensor, "b h m k"],
    v: Float[Tensor, "b h n e"],
    *,
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    border: str = "zero",
    backend: str = "auto",
) -> Float[Tensor, "b h m e"]:
    r"""Each query sums the cells around it by weights of its own: $o_i = \sum_a w_{ia}\, v_{s i + t (a - \lfloor k/2 \rfloor)}$.

    The index is that of one axis, and a window of several axes is the product of theirs, places in raster order. Time O(m k e);
    memory that of weights, v and the result, backward too.

    Args:
        weights: w, (b, h, queries, places of the window).
        v: the values of the cells of a grid, row-major.
        grid: sides of the grid, one to three, product n.
        window: k, cells along each axis; one number, or one an axis.
        stride: s, distance of the queries, of which there are ceil(side / s) along an axis, likewise.
        dilation: t, distance of the cells of a window, likewise.
        border: "zero", cells outside of the grid count as zero, or "shifted", the window moves inwards as in neighbourhood
            attention, whose order of the places it has.
        backend: "auto", "reference" (a table of all windows) or "eager".

    Raises:
        TypeError: a tensor is not of a floating dtype.
        ValueError: a shape or a rule does not fit the grid; windows that are shifted need a stride of 1, and must fit.
    """
    axes = windows_of(grid, window, stride, dilation, border)
    _check("v", weights, v, axes, math.prod(grid))
    weights, v = common_dtype(weights=weights, v=v)
    sums = accumulate_dtype(v.dtype)
    out: Tensor = OP(backend, v)(weights.to(sums), v.to(sums), axes)
    return out.to(v.dtype)


def neighborhood_scatter(
    weights: Float[Tensor, "b h m k"],
    u: Float[Tensor, "b h m e"],
    *,
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    border: str = "zero",
    backend: str = "auto",
) -> Float[Tensor, "b h n e"]:
    r"""Each query adds itself to the cells around it, by weights of its own: the adjoint of `neighborhood_aggregation`.

    $o_j = \sum_{i, a} w_{ia} u_i$ over all i and a that the aggregation reads cell j for. With weights of one this is a fold.
    What falls outside of the grid is dropped. Arguments and errors are those of `neighborhood_aggregation`.

    Args:
        weights: w, (b, h, queries, places of the window).
        u: what each query spreads.
        grid: sides of the grid of the result.
        window: see there.
        stride: see there.
        dilation: see there.
        border: see there.
        backend: see there.
    """
    axes = windows_of(grid, window, stride, dilation, border)
    _check("u", weights, u, axes, math.prod([axis.queries for axis in axes]))
    weights, u = common_dtype(weights=weights, u=u)
    sums = accumulate_dtype(u.dtype)
    out: Tensor = SPREAD(backend, u)(weights.to(sums), u.to(sums), axes)
    return out.to(u.dtype)


def _check(name: str, weights: Tensor, x: Tensor, axes: Sequence[Window], count: int) -> None:
    """Raise for shapes that do not fit the grid."""
    if weights.ndim != 4 or x.ndim != 4 or weights.shape[:2] != x.shape[:2]:
        raise ValueError(f"weights, {name}: expected (b, h, m, k) and (b, h, n, e), got {tuple(weights.shape)}, {tuple(x.shape)}")
    if x.shape[2] != count:
        raise ValueError(f"{name}: expected {count} tokens as the grid has, got {x.shape[2]}")
    wanted = (math.prod([axis.queries for axis in axes]), math.prod([axis.width for axis in axes]))
    if tuple(weights.shape[2:]) != wanted:
        raise ValueError(f"weights: expected {wanted[0]} queries of {wanted[1]} places, got {tuple(weights.shape[2:])}")
