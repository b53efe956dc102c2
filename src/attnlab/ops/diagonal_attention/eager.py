"""Diagonal attention a diagonal at a time, through shifted views of the keys, with an explicit backward.

A diagonal of a head is one product of its queries with the keys some places on: no matrix products, but no copies either. Some
queries go at a time, with the scores of all their diagonals, which are computed again in backward. Exponentials are powers of 2;
see `attnlab.ops.sliding_window.eager`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.buffers import Buffers
from attnlab.ops.chunks import full_precision

LN2 = math.log(2)
INF = float("inf")
ROWS = 2**11
"""Queries at a time: what one diagonal reads of them stays in cache."""


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    distances: Int[Tensor, "b h r"],
    allowed: Bool[Tensor, "b #h m"] | None,
    scale: float,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """See `reference.attend`. Backward is not differentiable again."""
    return forward(q, k, v, distances, allowed, scale)


class _Line(NamedTuple):
    """A diagonal of some queries: its row among the scores, its place there, and the queries and keys that meet on it."""

    row: int
    place: slice
    queries: slice
    keys: slice


class _Head:
    """One head of one example: contiguous rows in the dtype that sums run in; the queries are scaled for powers of 2."""

    def __init__(
        self,
        q: Float[Tensor, "n d"],
        k: Float[Tensor, "m d"],
        v: Float[Tensor, "m e"],
        distances: Int[Tensor, "r"],
        allowed: Bool[Tensor, "m"] | None,
        scale: float,
        buffers: Buffers,
    ) -> None:
        dtype = accumulate_dtype(q.dtype)
        self.penalty = None
        if allowed is not None:
            # What stands at a key that takes no part must not matter, and 0 * nan is not 0.
            k, v = (x.masked_fill(~allowed.unsqueeze(-1), 0) for x in (k, v))
            self.penalty = torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -INF)
        self.q, self.k, self.v = q.to(dtype) * (scale / LN2), k.to(dtype).contiguous(), v.to(dtype).contiguous()
        self.buffers = buffers
        self.distances = [x for x in distances.tolist() if -len(k) < x < len(q)]

    def segments(self) -> Iterator[tuple[slice, list[_Line]]]:
        """Some queries at a time, and the diagonals on which they have keys."""
        for start in range(0, len(self.q), ROWS):
            stop = min(start + ROWS, len(self.q))
            lines: list[_Line] = []
            for far in self.distances:
                first, last = max(start, far), min(stop, len(self.k) + far)
                if first < last:
                    place = slice(first - start, last - start)
                    lines.append(_Line(len(lines), place, slice(first, last), slice(first - far, last - far)))
            yield slice(start, stop), lines

    def products(self, name: str, x: Tensor, y: Tensor, lines: list[_Line], count: int, outside: float) -> Float[Tensor, "r x"]:
        """The products of rows of x with those of y that they meet, a row for each diagonal."""
        found = self.buffers(name, len(lines), count).fill_(outside)
        for line in lines:
            pair = self.buffers("pair", line.queries.stop - line.queries.start, x.shape[1])
            torch.mul(x[line.queries], y[line.keys], out=pair)
            torch.sum(pair, -1, out=found[line.row, line.place])
        return found

    def scores(self, lines: list[_Line], count: int) -> Float[Tensor, "r x"]:
        """Products of queries and keys as powers of 2, -inf where there is no key."""
        found = self.products("scores", self.q, self.k, lines, count, -INF)
        if self.penalty is not None:
            for line in lines:
                found[line.row, line.place] += self.penalty[line.keys]
        return found


def _heads(
    q: Tensor, k: Tensor, v: Tensor, distances: Tensor, allowed: Tensor | None, scale: float
) -> Iterator[tuple[int, int, int, _Head]]:
    """All heads, with their example and where they stand among queries and among keys."""
    group, buffers = q.shape[1] // k.shape[1], Buffers(q.new_empty(0, dtype=accumulate_dtype(q.dtype)))
    if allowed is not None:
        allowed = allowed.expand(-1, q.shape[1], -1)
    for i in range(len(q)):
        for h in range(q.shape[1]):
            real, own = None if allowed is None else allowed[i, h], h // group
            yield i, h, own, _Head(q[i, h], k[i, own], v[i, own], distances[i, h], real, scale, buffers)


@torch.library.custom_op(
    "attnlab::diagonal_attention_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor distances, Tensor? allowed, float scale) -> (Tensor, Tensor)",
)
@full_precision
def forward(q: Tensor, k: Tensor, v: Tensor, distances: Tensor, allowed: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    wide = accumulate_dtype(q.dtype)
    out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=wide)
    lse = q.new_full(q.shape[:3], -INF, dtype=wide)
    lowest = torch.finfo(wide).min
    for i, h, _, head in _heads(q, k, v, distances, allowed, scale):
        for rows, lines in head.segments():
            if not lines:
                continue
            weights = head.scores(lines, rows.stop - rows.start)
            # The lowest number, where there is no key: weights are then 0 and not exp(inf - inf).
            top = weights.amax(0).clamp_min_(lowest)
            weights.sub_(top).exp2_()
            for line in lines:
                out[i, h, line.queries].addcmul_(weights[line.row, line.place].unsqueeze(-1), head.v[line.keys])
            # A query with a key has a weight of 1.
            total = weights.sum(0).clamp_min_(1)
            out[i, h, rows].div_(total.unsqueeze(-1))
            lse[i, h, rows] = total.log2_().add_(top).mul_(LN2).masked_fill_(top == lowest, -INF)
    return out.to(q.dtype), lse


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op(
    "attnlab::diagonal_attention_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor distances, Tensor? allowed, Tensor out, Tensor lse, Tensor dout, Tensor dlse, "
    "float scale) -> (Tensor, Tensor, Tensor)",
)
@full_precision
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distances: Tensor,
    allowed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=q.device) for x in (q, k, v))
    nothing = lse == -INF
    dout = dout.to(lse.dtype).masked_fill(nothing.unsqueeze(-1), 0)
    inner = ((dout * out).sum(-1) - dlse).masked_fill_(nothing, 0)
    logsum = (lse / LN2).masked_fill_(nothing, INF)  # weights of 0
    for i, h, own, head in _heads(q, k, v, distances, allowed, scale):
        came = dout[i, h].contiguous()
        for rows, lines in head.segments():
            count = rows.stop - rows.start
            weights = head.scores(lines, count).sub_(logsum[i, h, rows]).exp2_()
            dscores = head.products("dscores", came, head.v, lines, count, 0.0).sub_(inner[i, h, rows]).mul_(weights)
            for line in lines:
                given, share = dscores[line.row, line.place].unsqueeze(-1), weights[line.row, line.place].unsqueeze(-1)
                dq[i, h, line.queries].addcmul_(given, head.k[line.keys])
                dk[i, own, line.keys].addcmul_(given, head.q[line.queries])
                dv[i, own, line.keys].addcmul_(share, came[line.queries])
    # the queries were scaled for powers of 2
    return dq.mul_(scale).to(q.dtype), dk.mul_(LN2).to(k.dtype), dv.to(v.dtype)


@backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *arguments, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    return *backward(*arguments, out, lse, dout, dlse, ctx.scale), None, None, None


forward.register_autograd(_differentiate, setup_context=_save)
