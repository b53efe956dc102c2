"""Exact attention with the keys in pieces: any cut, or stream-K's, put together by the log-sum-exp merge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.ops.executions import Counts, execution, real_keys
from attnlab.ops.partial_attention import Partial, merge, partial_attention
from attnlab.ops.partial_attention.schedule import stream_k, tiles_of


def split_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    sizes: Sequence[int],
    *,
    lengths: Int[Tensor, "b"] | None = None,
) -> Partial:
    """Attention over all keys from that over consecutive pieces of them.

    Args:
        q: queries (b, h, n, d).
        k: keys (b, hk, m, d); ``hk`` divides ``h``, the query heads of a group are rows of one problem.
        v: values (b, hk, m, e).
        sizes: keys of each piece, with sum m; a piece may be empty.
        lengths: how many keys of each example are real.

    Raises:
        ValueError: if the sizes are negative or do not add up, or the heads do not fit.
    """
    m = k.shape[2]
    if min(sizes, default=-1) < 0 or sum(sizes) != m:
        raise ValueError(f"sizes: expected sizes of at least 0 that add up to the {m} keys, got {list(sizes)[:8]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides the {q.shape[1]} of q, got {k.shape[1]}")
    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    parts, start = [], 0
    for size in sizes:
        stop = start + size
        allowed = real_keys(lengths, start, stop)
        parts.append(partial_attention(rows, k[:, :, start:stop], v[:, :, start:stop], allowed=allowed))
        start = stop
    output, lse = reduce(merge, parts)
    return Partial(output.unflatten(2, (-1, q.shape[2])).flatten(1, 2), lse.unflatten(2, (-1, q.shape[2])).flatten(1, 2))


@execution("split_keys", family="decode", paper="lean-attention")
def split_keys(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    lengths: Int[Tensor, "b"] | None = None,
    counts: Counts | None = None,
    parts: int = 8,
) -> Float[Tensor, "b h n e"]:
    """Every example's keys in pieces of about one size, attended to apart and merged (Flash-Decoding's order).

    Args:
        parts: how many pieces.

    Raises:
        ValueError: for fewer than one.
    """
    if parts < 1:
        raise ValueError(f"parts: expected at least 1, got {parts}")
    m = k.shape[2]
    sizes = [(part + 1) * m // parts - part * m // parts for part in range(parts)]
    _tally(counts, q, k, v, max(sizes))
    return split_attention(q, k, v, sizes, lengths=lengths).output


@execution("stream_k", family="decode", paper="lean-attention")
def stream_k_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    lengths: Int[Tensor, "b"] | None = None,
    counts: Counts | None = None,
    tile: int = 256,
    workers: int = 8,
) -> Float[Tensor, "b h n e"]:
    """A ragged batch dealt evenly to workers (Sanovar et al. 2024, Lean Attention, section IV).

    The tiles of all examples and heads lie on one line; each worker takes an equal stretch of it, which may end one output and
    begin the next. Partial outputs of the same output are merged in any order. Here the workers take turns.

    Args:
        tile: keys that are dealt at once.
        workers: how many.

    Raises:
        ValueError: for fewer than one of either.
    """
    b, h, _, _ = q.shape
    lengths = torch.full((b,), k.shape[2], device=q.device) if lengths is None else lengths
    keys = [int(length) for length in lengths for _ in range(h)]
    found: dict[int, Partial] = {}
    for pieces in stream_k(tiles_of(keys, tile), workers):
        for output, start, stop in pieces:
            where = divmod(output, h)
            reach = slice(start * tile, min(stop * tile, keys[output]))
            part = partial_attention(q[where][None, None], k[where][None, None, reach], v[where][None, None, reach])
            found[output] = merge(found[output], part) if output in found else part
    _tally(counts, q, k, v, tile)
    nothing = q.new_zeros(q.shape[2], v.shape[3])
    outputs = [found[output].output[0, 0] if output in found else nothing for output in range(b * h)]
    return torch.stack(outputs).unflatten(0, (b, h))


def _tally(counts: Counts | None, q: Tensor, k: Tensor, v: Tensor, size: int) -> None:
    if counts is None:
        return
    weights = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    counts.passes += 1
    counts.reads += k.numel() + v.numel()
    counts.exponentials += weights
    counts.divisions += q.shape[0] * q.shape[1] * q.shape[2] * v.shape[3] * -(-k.shape[2] // max(size, 1))
    counts.live = max(counts.live, q.shape[0] * q.shape[1] * q.shape[2] * size)
