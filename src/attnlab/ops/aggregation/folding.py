"""Windows that mix their cells among themselves and are summed where they overlap, as one aggregation with larger windows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.aggregation.runs import Window, windows_of


def fold_kernels(
    weights: Float[Tensor, "b h m k k"], *, grid: Sequence[int], window: int | Sequence[int], stride: int | Sequence[int] = 1
) -> Float[Tensor, "b h n j"]:
    r"""The weights between cells, where window l gives its place r the mix $\sum_c A_{lrc}\, v_{l + c}$ and windows are summed.

    Windows are those of `neighborhood_aggregation`, border "zero". That function, given what is returned and windows of 2 k - 1
    cells a side, makes $y_j = \sum_{l + r = j} \sum_c A_{lrc}\, v_{l+c}$: no window's cells are ever copied. Time O(m k^2) for
    k places, without the width of the values.

    Args:
        weights: A, (b, h, windows, places that receive, places that are read).
        grid: sides of the grid.
        window: k, cells along each axis; one number, or one an axis.
        stride: distance of the windows, likewise.

    Returns:
        (b, h, n, product of 2 k - 1).

    Raises:
        ValueError: a shape or a rule does not fit the grid.
    """
    axes = windows_of(grid, window, stride)
    places = 1
    for axis in axes:
        places *= axis.width
    if weights.ndim != 5 or tuple(weights.shape[3:]) != (places, places):
        raise ValueError(f"weights: expected (b, h, windows, {places}, {places}), got {tuple(weights.shape)}")
    folded: Tensor = _fold(weights, [a.size for a in axes], [a.width for a in axes], [a.stride for a in axes])
    return folded


def _pairs(axes: Sequence[Window]) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """For each receiving place: its windows' weights, and where they stand among those of the cells."""
    every = (slice(None), slice(None))
    for runs in itertools.product(*(list(axis.runs()) for axis in axes)):
        places = [run.place for run in runs if run.place is not None]
        slots = [slice(a.width - 1 - place, 2 * a.width - 1 - place) for a, place in zip(axes, places, strict=True)]
        yield (*every, *(run.queries for run in runs), *places), (*every, *(run.cells for run in runs), *slots)


def _axes(grid: list[int], window: list[int], stride: list[int]) -> tuple[list[Window], list[int], list[int]]:
    """The rules, the shape of A, and that of the result, after batch and heads."""
    axes = [Window(size, width, step, 1, shifted=False) for size, width, step in zip(grid, window, stride, strict=True)]
    return axes, [*(axis.queries for axis in axes), *window, *window], [*grid, *(2 * width - 1 for width in window)]


@torch.library.custom_op(
    "attnlab::fold_kernels", mutates_args=(), schema="(Tensor weights, SymInt[] grid, int[] window, int[] stride) -> Tensor"
)
def _fold(weights: Tensor, grid: list[int], window: list[int], stride: list[int]) -> Tensor:
    axes, shape, folded = _axes(grid, window, stride)
    given = weights.reshape(*weights.shape[:2], *shape)
    out = weights.new_zeros(*weights.shape[:2], *folded)
    for source, target in _pairs(axes):
        out[target] += given[source]
    return out.flatten(-len(grid)).flatten(2, -2)


@torch.library.custom_op(
    "attnlab::unfold_kernels", mutates_args=(), schema="(Tensor kernels, SymInt[] grid, int[] window, int[] stride) -> Tensor"
)
def _unfold(kernels: Tensor, grid: list[int], window: list[int], stride: list[int]) -> Tensor:
    axes, shape, folded = _axes(grid, window, stride)
    given = kernels.reshape(*kernels.shape[:2], *folded)
    out = kernels.new_zeros(*kernels.shape[:2], *shape)
    for source, target in _pairs(axes):
        out[source] = given[target]
    rank = len(grid)
    return out.flatten(-rank).flatten(-rank - 1, -2).flatten(2, -3)


@_fold.register_fake
def _(weights: Tensor, grid: list[int], window: list[int], stride: list[int]) -> Tensor:
    cells, places = 1, 1
    for size, width in zip(grid, window, strict=True):
        cells, places = cells * size, places * (2 * width - 1)
    return weights.new_empty(*weights.shape[:2], cells, places)


@_unfold.register_fake
def _(kernels: Tensor, grid: list[int], window: list[int], stride: list[int]) -> Tensor:
    windows, places = 1, 1
    for size, width, step in zip(grid, window, stride, strict=True):
        windows, places = windows * -(-size // step), places * width
    return kernels.new_empty(*kernels.shape[:2], windows, places, places)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rules = inputs[1:]


_fold.register_autograd(lambda ctx, grad: (_unfold(grad, *ctx.rules), None, None, None), setup_context=_save)
_unfold.register_autograd(lambda ctx, grad: (_fold(grad, *ctx.rules), None, None, None), setup_context=_save)
