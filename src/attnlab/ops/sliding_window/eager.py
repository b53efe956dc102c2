"""Sliding-window attention in blocks of queries, with an explicit backward: memory O(n d), work O(n (window + block) d).

A chunk of blocks is one batched product into a buffer that stays in cache; `blocks` says how they are cut. Exponentials are
powers of 2, with log2(e) in the scale of the queries: on CPUs `torch.exp2` takes a quarter of the time of `torch.exp`, and has
no slow range.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.buffers import Buffers
from attnlab.ops.chunks import full_precision
from attnlab.ops.sliding_window.blocks import Chunk, Keys, Plan, Sinks, Window

CHUNK = {"cpu": 2**20}
"""Scores in a chunk by device: few enough for a CPU's cache, many enough for its threads to meet seldom; 2**25 elsewhere."""

LN2 = math.log(2)


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    key_mask: Bool[Tensor, "b m"] | None,
    left: int,
    right: int,
    num_sinks: int,
    scale: float,
) -> Float[Tensor, "b h n e"]:
    """See `reference.attend`. Backward is not differentiable again."""
    if q.shape[2] == 1:
        return _one_query(q, k, v, key_mask, left, num_sinks, scale)
    return _forward(q, k, v, key_mask, left, right, num_sinks, scale)[0]


@full_precision
def _one_query(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, left: int, num_sinks: int, scale: float) -> Tensor:
    """The last position alone, as one call of SDPA: the query heads of a key head are its queries."""
    batch, heads, _, width = q.shape
    if num_sinks + left + 1 < k.shape[2]:
        k, v = (_sinks_and_last(t, 2, num_sinks, left + 1) for t in (k, v))
        key_mask = None if key_mask is None else _sinks_and_last(key_mask, 1, num_sinks, left + 1)
    q = q.reshape(batch, k.shape[1], -1, width)
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).reshape(batch, heads, 1, -1)
    key_mask = key_mask[:, None, None]
    empty = ~key_mask.any(-1, keepdim=True)
    k, v = (t.masked_fill(~key_mask.mT, 0) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask | empty, scale=scale)
    return out.masked_fill(empty, 0).reshape(batch, heads, 1, -1)


def _sinks_and_last(x: Tensor, dim: int, num_sinks: int, last: int) -> Tensor:
    window = x.narrow(dim, x.shape[dim] - last, last)
    return torch.cat([x.narrow(dim, 0, num_sinks), window], dim) if num_sinks else window


class _Work:
    """The arranged inputs of a call, in the dtype that sums run in."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, left: int, right: int, num_sinks: int, scale: float
    ) -> None:
        dtype = accumulate_dtype(q.dtype)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        if key_mask is not None:
            # What stands at a masked key must not matter, and 0 * nan is not 0.
            k, v = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (k, v))
        self.plan = plan = Plan.of(q.shape[2], k.shape[2], left, right, q.shape[1] // k.shape[1])
        self.buffers = Buffers(q)
        self.scale = scale / LN2
        self.q = self.rows(q)
        self.parts: list[Keys] = [Window(plan, self.buffers, k, v, key_mask)]
        num_sinks = min(num_sinks, plan.keys - 1 - plan.left)
        if num_sinks > 0:
            sink_mask = None if key_mask is None else key_mask[:, :num_sinks]
            self.parts.append(Sinks(plan, self.buffers, k[:, :, :num_sinks], v[:, :, :num_sinks], sink_mask))
        self.chunks = list(plan.chunks(len(self.q), CHUNK.get(q.device.type, 2**25)))

    def rows(self, x: Tensor) -> Tensor:
        """(b h n c) as (R r n' c) with n' in whole blocks."""
        missing = self.plan.blocks * self.plan.block - self.plan.queries
        x = x.reshape(-1, self.plan.group, *x.shape[2:])
        return F.pad(x, (0, 0, 0, missing)) if missing else x

    def restore(self, x: Tensor, like: Tensor) -> Tensor:
        """(R r n' c) as (b h n c), the inverse of `rows`."""
        return x[:, :, : self.plan.queries].reshape(*like.shape[:3], -1).contiguous()

    def tile(self, x: Tensor, chunk: Chunk) -> Tensor:
        """A chunk of (R r n' c) as a view (R B r w c)."""
        block, blocks = self.plan.block, chunk.blocks
        part = x[chunk.rows, :, blocks.start * block : blocks.stop * block]
        return part.unflatten(2, (-1, block)).transpose(1, 2)

    def queries(self, chunk: Chunk) -> Tensor:
        """A chunk of the queries, scaled for scores in powers of 2, (R B r w d)."""
        tile = self.tile(self.q, chunk)
        return torch.mul(tile, self.scale, out=self.buffers("queries", *tile.shape))


@torch.library.custom_op(
    "attnlab::sliding_window_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? key_mask, SymInt left, SymInt right, SymInt num_sinks, float scale) "
    "-> (Tensor, Tensor)",
)
@full_precision
def _forward(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    key_mask: Bool[Tensor, "b m"] | None,
    left: int,
    right: int,
    num_sinks: int,
    scale: float,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n 1"]]:
    """The output, and the logarithm (to base 2) of each query's sum of weights, (b h n 1)."""
    work = _Work(q, k, v, key_mask, left, right, num_sinks, scale)
    out = work.q.new_empty(*work.q.shape[:3], v.shape[-1])
    logsum = work.q.new_empty(*work.q.shape[:3], 1)
    for chunk in work.chunks:
        queries = work.queries(chunk)
        scores = [part.scores(queries, chunk) for part in work.parts]
        # The lowest number, where there is no key: weights are then 0 and not exp(inf - inf).
        top = functools.reduce(torch.maximum, (s.flatten(0, 1).amax(-1, keepdim=True) for s in scores))
        top.clamp_min_(torch.finfo(top.dtype).min)
        for s in scores:
            s.flatten(0, 1).sub_(top).exp2_()
        # A query with a key has a weight of 1.
        total = functools.reduce(torch.add, (s.flatten(0, 1).sum(-1, keepdim=True) for s in scores)).clamp_min_(1)
        read = functools.reduce(torch.add, (part.read(s, part.v, chunk) for part, s in zip(work.parts, scores, strict=True)))
        tile = work.tile(out, chunk)
        tile.copy_(read.div_(total).view(tile.shape))
        work.tile(logsum, chunk).copy_(top.add_(total.log2_()).view(*tile.shape[:-1], 1))
    return work.restore(out, q).to(q.dtype), work.restore(logsum, q)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, left: int, right: int, num_sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    return out, q.new_empty(*q.shape[:3], 1, dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op(
    "attnlab::sliding_window_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor out, Tensor logsum, Tensor dout, SymInt left, SymInt right, "
    "SymInt num_sinks, float scale) -> (Tensor, Tensor, Tensor)",
)
@full_precision
def _backward(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    key_mask: Bool[Tensor, "b m"] | None,
    out: Float[Tensor, "b h n e"],
    logsum: Float[Tensor, "b h n 1"],
    dout: Float[Tensor, "b h n e"],
    left: int,
    right: int,
    num_sinks: int,
    scale: float,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b hk m d"], Float[Tensor, "b hk m e"]]:
    """The gradients of q, k and v."""
    work = _Work(q, k, v, key_mask, left, right, num_sinks, scale)
    dout = dout.to(work.q.dtype)
    inner = work.rows((dout * out).sum(-1, keepdim=True))
    dout, logsum = work.rows(dout), work.rows(logsum)
    dq = torch.empty_like(work.q, memory_format=torch.contiguous_format)
    gradients = [(torch.zeros_like(part.k), torch.zeros_like(part.v)) for part in work.parts]
    for chunk in work.chunks:
        tile = work.tile(dq, chunk)
        tile.copy_(_backward_chunk(work, chunk, dout, inner, logsum, gradients).view(tile.shape))
    dk, dv = k.new_zeros(k.shape, dtype=dq.dtype), v.new_zeros(v.shape, dtype=dq.dtype)
    for part, (part_k, part_v) in zip(work.parts, gradients, strict=True):
        part.deliver(part_k.mul_(LN2), dk)  # the queries were scaled for powers of 2
        part.deliver(part_v, dv)
    return work.restore(dq.mul_(scale), q).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _backward_chunk(
    work: _Work, chunk: Chunk, dout: Tensor, inner: Tensor, logsum: Tensor, gradients: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Add a chunk's gradients of keys and values, and return that of its queries, unscaled, (all rows, d)."""
    queries = work.queries(chunk)
    tile = work.tile(dout, chunk)
    dout = work.buffers("dout", *tile.shape).copy_(tile)
    inner, logsum = (work.tile(x, chunk).reshape(-1, 1) for x in (inner, logsum))
    dq = []
    for part, (dk, dv) in zip(work.parts, gradients, strict=True):
        weights = part.scores(queries, chunk)
        weights.flatten(0, 1).sub_(logsum).exp2_()
        part.spread(dv, weights, dout, chunk)
        dscores = part.products(dout, part.v, chunk, "dscores")
        dscores.flatten(0, 1).sub_(inner).mul_(weights.flatten(0, 1))
        part.spread(dk, dscores, queries, chunk)
        dq.append(part.read(dscores, part.k, chunk))
    return functools.reduce(torch.add, dq)


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    logsum: Tensor,
    dout: Tensor,
    left: int,
    right: int,
    num_sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(*ctx.saved_tensors, dout, *ctx.options), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
