"""Cutting a sequence into chunks and the work into tiles that stay in a CPU's cache; shared by the chunked recurrences.

Tensors here are (heads, n, width), batch and heads in one. A tile is a few heads times a segment, a segment some chunks in
a row; the tokens that fill no chunk are a last segment of one shorter chunk, so nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce, wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Segment(NamedTuple):
    """Tokens ``start`` to ``stop`` (exclusive), in chunks of ``size`` that divides their number."""

    start: int
    stop: int
    size: int


def segments(length: int, size: int, chunks: int) -> list[Segment]:
    """Cut ``length`` tokens into segments of at most ``chunks`` chunks of ``size`` tokens, and the remainder."""
    whole = length - length % size
    span = chunks * size
    cut = [Segment(start, min(start + span, whole), size) for start in range(0, whole, span)]
    return cut + ([Segment(whole, length, length - whole)] if whole < length else [])


def room_for_starts(length: int, size: int, chunks: int) -> int:
    """At least the number of segments after the first, and never 0: a symbolic length needs no guard, as an exact count would."""
    return length // (size * chunks) + 1


def head_groups(heads: int, group: int) -> list[slice]:
    """Slices of at most ``group`` heads."""
    return [slice(start, min(start + group, heads)) for start in range(0, heads, group)]


def rows(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "bh n d"]:
    """Batch and heads as one; a view unless memory forbids it or the rows are of a form that slows every product."""
    if x.stride(-1) != 1 or x.stride(-2) < x.shape[-1]:
        x = x.contiguous()
    return x.flatten(0, 1)


def blocks(x: Float[Tensor, "bh n d"], heads: slice, segment: Segment) -> Float[Tensor, "chunks size d"]:
    """The chunks of a tile, heads outermost; a view for one head, or for whole contiguous sequences."""
    return x[heads, segment.start : segment.stop].reshape(-1, segment.size, x.shape[-1])


def landing(x: Float[Tensor, "bh n d"], heads: slice, segment: Segment) -> Float[Tensor, "chunks size d"]:
    """Where to compute a tile of the output ``x``: its own memory if that is contiguous, otherwise new memory for `land`."""
    region = x[heads, segment.start : segment.stop]
    memory = region if region.is_contiguous() else torch.empty_like(region, memory_format=torch.contiguous_format)
    return memory.view(-1, segment.size, x.shape[-1])


def land(tile: Float[Tensor, "chunks size d"], x: Float[Tensor, "bh n d"], heads: slice, segment: Segment) -> None:
    """Copy a computed tile to its place in ``x``, unless `landing` had put it there."""
    region = x[heads, segment.start : segment.stop]
    if region.data_ptr() != tile.data_ptr():
        region.copy_(tile.view(region.shape))


def first_state(
    q: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"], state: Float[Tensor, "b h d e"] | None
) -> Float[Tensor, "b h d e"]:
    """``state``, or zeros."""
    return q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state


def walk(
    count: int, edge: Float[Tensor, "g d e"], step: Callable[[int, Tensor, Tensor], None], *, reverse: bool = False
) -> Float[Tensor, "count_1 g d e"]:
    """States before every chunk and after the last from the first, ``edge``; or, ``reverse``, their gradients from the last.

    ``step(i, source, target)`` takes chunk i's state from ``source`` and writes what it becomes to ``target``.
    """
    memory = edge.new_empty(count + 1, *edge.shape)
    states = memory.unbind(0)
    states[count if reverse else 0].copy_(edge)
    for i in reversed(range(count)) if reverse else range(count):
        source, target = (i + 1, i) if reverse else (i, i + 1)
        step(i, states[source], states[target])
    return memory


def states_before(states: Float[Tensor, "chunks_1 g d e"]) -> Float[Tensor, "chunks d e"]:
    """The state before each chunk, heads outermost as in a tile's chunks."""
    return states[:-1].transpose(0, 1).flatten(0, 1)


def states_after(states: Float[Tensor, "chunks_1 g d e"]) -> Float[Tensor, "chunks d e"]:
    """The state after each chunk, heads outermost."""
    return states[1:].transpose(0, 1).flatten(0, 1)


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a kernel so that an autocast region around its call doesn't lower the precision of its products."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args, **kwargs)  # entering the two contexts costs more than a small op
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


def common_dtype(**tensors: Tensor) -> list[Tensor]:
    """The tensors in the widest of their dtypes, which may differ under autocast; TypeError for one that isn't floating point."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    return [tensor.to(dtype) for tensor in tensors.values()]
