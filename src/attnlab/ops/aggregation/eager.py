"""Aggregation over neighbourhoods through shifted views, one place of the window at a time; nothing is unfolded.

Three bilinear forms of weights w, cells v and queries u over the same pairs, of which each is the derivative of the others:
`gather` sums w v into queries, `spread` sums w u into cells, `products` sums u v into weights. Queries whose windows are shifted
to the same cells are a matrix product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.aggregation.runs import Window
from attnlab.ops.chunks import full_precision

RULES = "SymInt[] grid, int[] window, int[] stride, int[] dilation, bool shifted"


def gather(weights: Float[Tensor, "b h m k"], v: Float[Tensor, "b h n e"], axes: Sequence[Window]) -> Float[Tensor, "b h m e"]:
    """See `reference.gather`."""
    return _gather(weights, v, *_rules(axes))


def spread(weights: Float[Tensor, "b h m k"], u: Float[Tensor, "b h m e"], axes: Sequence[Window]) -> Float[Tensor, "b h n e"]:
    """See `reference.spread`."""
    return _spread(weights, u, *_rules(axes))


def _rules(axes: Sequence[Window]) -> tuple[list[int], list[int], list[int], list[int], bool]:
    sizes, widths, strides, dilations = ([axis[i] for axis in axes] for i in range(4))
    return sizes, widths, strides, dilations, axes[0].shifted


class _Step(NamedTuple):
    """Views for one combination of runs of the axes: weights, queries, cells, and how they are summed if by a product."""

    weights: tuple[Any, ...]
    queries: tuple[Any, ...]
    cells: tuple[Any, ...]
    letters: tuple[str, str, str] | None

    def product(self, buffer: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """u v, summed over the width, in memory that all steps share."""
        memory = buffer[: u.numel()].view(u.shape)
        return torch.mul(u, v, out=memory).sum(-1)


class _Plan:
    """The axes of a grid in views."""

    def __init__(self, grid: list[int], window: list[int], stride: list[int], dilation: list[int], shifted: bool) -> None:
        self.axes = [Window(*rule, shifted) for rule in zip(grid, window, stride, dilation, strict=True)]
        self.cells = grid
        self.queries = [axis.queries for axis in self.axes]
        self.places = window

    def steps(self) -> Iterator[_Step]:
        """All pairs of a query and a place of its window that holds a cell."""
        every = (slice(None), slice(None))
        for runs in itertools.product(*(list(axis.runs()) for axis in self.axes)):
            places = tuple(slice(None) if run.place is None else run.place for run in runs)
            queries, cells = tuple(run.queries for run in runs), tuple(run.cells for run in runs)
            letters = None
            if slice(None) in places:
                rows = "xyz"[: len(runs)]
                read = "".join("uvw"[i] if run.place is None else rows[i] for i, run in enumerate(runs))
                shared = "".join(letter for letter in read if letter in "uvw")
                letters = (f"{shared}bh{rows}", f"bh{rows}e", f"bh{read}e")
            yield _Step((*places, *every, *queries), (*every, *queries), (*every, *cells), letters)

    def split(self, weights: Float[Tensor, "b h m k"]) -> Tensor:
        """Weights with the places of the window outermost, so that a place is read in one piece."""
        return weights.movedim(3, 0).contiguous().unflatten(-1, self.queries).unflatten(0, self.places)


@torch.library.custom_op("attnlab::neighborhood_gather", mutates_args=(), schema=f"(Tensor weights, Tensor v, {RULES}) -> Tensor")
@full_precision
def _gather(
    weights: Tensor, v: Tensor, grid: list[int], window: list[int], stride: list[int], dilation: list[int], shifted: bool
) -> Tensor:
    plan = _Plan(grid, window, stride, dilation, shifted)
    w, cells = plan.split(weights), v.unflatten(2, plan.cells)
    out = v.new_zeros(*v.shape[:2], *plan.queries, v.shape[3])
    for step in plan.steps():
        if step.letters is None:
            out[step.queries].addcmul_(w[step.weights].unsqueeze(-1), cells[step.cells])
        else:
            a, b, c = step.letters
            out[step.queries] += torch.einsum(f"{a},{c}->{b}", w[step.weights], cells[step.cells])
    return out.flatten(2, -2)


@torch.library.custom_op("attnlab::neighborhood_spread", mutates_args=(), schema=f"(Tensor weights, Tensor u, {RULES}) -> Tensor")
@full_precision
def _spread(
    weights: Tensor, u: Tensor, grid: list[int], window: list[int], stride: list[int], dilation: list[int], shifted: bool
) -> Tensor:
    plan = _Plan(grid, window, stride, dilation, shifted)
    w, queries = plan.split(weights), u.unflatten(2, plan.queries)
    out = u.new_zeros(*u.shape[:2], *plan.cells, u.shape[3])
    for step in plan.steps():
        if step.letters is None:
            out[step.cells].addcmul_(w[step.weights].unsqueeze(-1), queries[step.queries])
        else:
            a, b, c = step.letters
            out[step.cells] += torch.einsum(f"{a},{b}->{c}", w[step.weights], queries[step.queries])
    return out.flatten(2, -2)


@torch.library.custom_op("attnlab::neighborhood_products", mutates_args=(), schema=f"(Tensor u, Tensor v, {RULES}) -> Tensor")
@full_precision
def _products(
    u: Tensor, v: Tensor, grid: list[int], window: list[int], stride: list[int], dilation: list[int], shifted: bool
) -> Tensor:
    plan = _Plan(grid, window, stride, dilation, shifted)
    queries, cells = u.unflatten(2, plan.queries), v.unflatten(2, plan.cells)
    out, buffer = u.new_zeros(*plan.places, *queries.shape[:-1]), u.new_empty(u.numel())
    for step in plan.steps():
        if step.letters is None:
            out[step.weights] = step.product(buffer, queries[step.queries], cells[step.cells])
        else:
            a, b, c = step.letters
            out[step.weights] = torch.einsum(f"{b},{c}->{a}", queries[step.queries], cells[step.cells])
    return out.flatten(0, len(window) - 1).flatten(3).movedim(0, 3).contiguous()


@_gather.register_fake
def _(weights: Tensor, v: Tensor, *rules: Any) -> Tensor:
    return v.new_empty(*weights.shape[:3], v.shape[3])


@_spread.register_fake
def _(weights: Tensor, u: Tensor, grid: list[int], *rules: Any) -> Tensor:
    return u.new_empty(*u.shape[:2], math.prod(grid), u.shape[3])


@_products.register_fake
def _(u: Tensor, v: Tensor, grid: list[int], window: list[int], *rules: Any) -> Tensor:
    return u.new_empty(*u.shape[:3], math.prod(window))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.rules = inputs[2:]


def _none(*found: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors, none of the rules."""
    return (*found, None, None, None, None, None)


def _from_gather(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weights, v), needed = ctx.saved_tensors, ctx.needs_input_grad
    to_weights = _products(grad, v, *ctx.rules) if needed[0] else None
    return _none(to_weights, _spread(weights, grad, *ctx.rules) if needed[1] else None)


def _from_spread(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weights, u), needed = ctx.saved_tensors, ctx.needs_input_grad
    to_weights = _products(u, grad, *ctx.rules) if needed[0] else None
    return _none(to_weights, _gather(weights, grad, *ctx.rules) if needed[1] else None)


def _from_products(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (u, v), needed = ctx.saved_tensors, ctx.needs_input_grad
    return _none(_gather(grad, v, *ctx.rules) if needed[0] else None, _spread(grad, u, *ctx.rules) if needed[1] else None)


_gather.register_autograd(_from_gather, setup_context=_save)
_spread.register_autograd(_from_spread, setup_context=_save)
_products.register_autograd(_from_products, setup_context=_save)
