"""Sliding-window attention over blocks of queries, with an explicit backward: memory O(n d), work O(n (window + block) d).

The keys are padded once, so that block i of the queries sees keys ``i * block`` to ``i * block + span`` of the padded ones, through overlapping
strides and without a copy. A chunk of blocks is one batched product into a buffer that stays in cache. Sinks are a second part of the same
softmax. Exponentials are powers of 2, with log2(e) in the scale of the queries: on CPUs `torch.exp2` takes a quarter of the time of `torch.exp`.

Letters: R pairs of a sequence and a key head, r query heads of a key head, B blocks, w queries of a block, s keys that a block sees.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnlab.ops.backends import accumulate_dtype

BLOCK = 64
"""Queries in a block, at most."""

CHUNK = {"cpu": 2**19}
"""Scores in a chunk by device, to fit the second cache level; 2**25 elsewhere."""

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


def _one_query(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, left: int, num_sinks: int, scale: float
) -> Tensor:
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


@dataclass(frozen=True)
class _Plan:
    """Sizes of one call; positions are counted from the first key."""

    queries: int
    keys: int
    left: int
    right: int
    group: int
    blocks: int
    block: int

    @classmethod
    def of(cls, queries: int, keys: int, left: int, right: int, group: int) -> _Plan:
        blocks = -(-queries // BLOCK)
        # No key is further from a query than these, so a wider window would only add padding.
        left, right = min(left, keys - 1), min(right, queries - 1)
        return cls(queries, keys, left, right, group, blocks, -(-queries // blocks))

    @property
    def span(self) -> int:
        """Keys that a block of queries sees."""
        return self.block + self.left + self.right

    @property
    def tiles(self) -> int:
        """Blocks of keys that a block of queries touches, the last in part."""
        return -(-self.span // self.block)

    @property
    def padded(self) -> int:
        """Length of the padded keys, in whole blocks."""
        return (self.blocks + self.tiles - 1) * self.block

    @property
    def first(self) -> int:
        """The position of the first padded key; negative where there is padding."""
        return self.keys - self.queries - self.left

    @property
    def real(self) -> slice:
        """The padded keys that are keys, [start, stop) in padded places; ``first`` added gives their positions."""
        return slice(max(0, -self.first), min(self.padded, self.keys - self.first))

    def chunks(self, rows: int, size: int) -> Iterator[_Chunk]:
        """Whole rows while they are short, otherwise parts of a row, of about ``size`` scores."""
        count = max(1, size // (self.group * self.block * self.span))
        height, length = max(1, count // self.blocks), min(count, self.blocks)
        for row in range(0, rows, height):
            for block in range(0, self.blocks, length):
                yield _Chunk(slice(row, min(row + height, rows)), slice(block, min(block + length, self.blocks)))


@dataclass(frozen=True)
class _Chunk:
    """The blocks that are computed together."""

    rows: slice
    blocks: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(R, B)."""
        return self.rows.stop - self.rows.start, self.blocks.stop - self.blocks.start


class _Buffers:
    """Memory by name, used again by every chunk: fresh memory costs more than what is computed in it."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.flat or self.flat[name].numel() < size:
            self.flat[name] = self.like.new_empty(size)
        return self.flat[name][:size].view(shape)


class _Keys:
    """Keys and values (R tokens d), zeros where they are masked, and what a chunk of queries does with them.

    Subclasses say which keys a chunk sees, and with which additive masks.
    """

    k: Tensor
    v: Tensor
    name: str

    def __init__(self, plan: _Plan, buffers: _Buffers) -> None:
        self.plan, self.buffers = plan, buffers

    def seen(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """The rows of ``x`` that each product sees, transposed: (products, d, keys)."""
        raise NotImplementedError

    def masks(self, chunk: _Chunk) -> list[Tensor]:
        """What is to be added to scores (R B r w keys)."""
        raise NotImplementedError

    def accumulate(self, total: Tensor, parts: Tensor, chunk: _Chunk) -> None:
        """Add a chunk's gradients (products keys d) to those of all keys."""
        raise NotImplementedError

    def deliver(self, total: Tensor, out: Tensor) -> None:
        """Add a total (R tokens d) to the gradient of the argument (b hk m d)."""
        raise NotImplementedError

    def scores(self, queries: Tensor, chunk: _Chunk) -> Tensor:
        """(products rows keys), masked."""
        scores = self.products(queries, self.k, chunk, "scores")
        for mask in self.masks(chunk):
            scores.view(*queries.shape[:-1], -1).add_(mask)
        return scores

    def products(self, rows: Tensor, x: Tensor, chunk: _Chunk, name: str) -> Tensor:
        """Rows (R B r w d) times what they see of ``x``, in a buffer."""
        seen = self.seen(x, chunk)
        rows = rows.view(len(seen), -1, rows.shape[-1])
        return torch.bmm(rows, seen, out=self.buffers(self.name + name, *rows.shape[:2], seen.shape[-1]))

    def read(self, weights: Tensor, x: Tensor, chunk: _Chunk) -> Tensor:
        """Weights (products rows keys) times what they see of ``x``, as (all rows, d)."""
        return torch.bmm(weights, self.seen(x, chunk).mT).flatten(0, 1)

    def spread(self, total: Tensor, weights: Tensor, rows: Tensor, chunk: _Chunk) -> None:
        """Add transposed weights times rows (R B r w d) to ``total``."""
        rows = rows.view(len(weights), -1, rows.shape[-1])
        shape = (len(weights), weights.shape[-1], rows.shape[-1])
        self.accumulate(total, torch.bmm(weights.mT, rows, out=self.buffers(self.name + "parts", *shape)), chunk)


class _Window(_Keys):
    """The keys around each query."""

    name = "window"

    def __init__(self, plan: _Plan, buffers: _Buffers, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
        super().__init__(plan, buffers)
        real, first = plan.real, plan.first
        positions = slice(real.start + first, real.stop + first)
        self.k, self.v = (self._pad(x[:, :, positions]) for x in (k, v))
        bias = k.new_full((1, plan.padded), -torch.inf)
        bias[:, real] = 0
        if key_mask is not None:
            bias = bias.repeat(len(self.k), 1)
            bias[:, real].masked_fill_(~key_mask[:, positions].repeat_interleave(k.shape[1], 0), -torch.inf)
        self.bias, self.all_real = bias, key_mask is None
        ahead = torch.arange(plan.span, device=k.device) - torch.arange(plan.block, device=k.device)[:, None]
        outside = (ahead < 0) | (ahead > plan.left + plan.right)
        self.band = torch.zeros_like(outside, dtype=k.dtype).masked_fill_(outside, -torch.inf)

    def _pad(self, x: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:2], self.plan.padded, x.shape[-1])
        out[:, :, self.plan.real] = x
        return out.flatten(0, 1)

    def _windows(self, x: Tensor, chunk: _Chunk) -> Tensor:
        block = self.plan.block
        part = x[:, chunk.blocks.start * block : (chunk.blocks.stop - 1) * block + self.plan.span]
        return part.unfold(1, self.plan.span, block)

    def seen(self, x: Tensor, chunk: _Chunk) -> Tensor:
        return self._windows(x[chunk.rows], chunk).flatten(0, 1)

    def masks(self, chunk: _Chunk) -> list[Tensor]:
        block, real = self.plan.block, self.plan.real
        start, stop = chunk.blocks.start * block, (chunk.blocks.stop - 1) * block + self.plan.span
        if self.all_real and real.start <= start and stop <= real.stop:
            return [self.band]
        bias = self.bias if self.all_real else self.bias[chunk.rows]
        return [self.band, self._windows(bias, chunk)[:, :, None, None]]

    def accumulate(self, total: Tensor, parts: Tensor, chunk: _Chunk) -> None:
        block, blocks = self.plan.block, chunk.blocks
        parts = parts.unflatten(0, chunk.shape)
        tiles = total[chunk.rows].unflatten(1, (-1, block))
        for tile in range(self.plan.tiles):
            part = parts[:, :, tile * block : (tile + 1) * block]
            tiles[:, blocks.start + tile : blocks.stop + tile, : part.shape[2]] += part

    def deliver(self, total: Tensor, out: Tensor) -> None:
        real, first = self.plan.real, self.plan.first
        out[:, :, real.start + first : real.stop + first] += total[:, real].unflatten(0, out.shape[:2])


class _Sinks(_Keys):
    """The first keys of all, for the queries whose window begins after them."""

    name = "sinks"

    def __init__(self, plan: _Plan, buffers: _Buffers, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
        super().__init__(plan, buffers)
        self.k, self.v = k.flatten(0, 1), v.flatten(0, 1)
        self.places = torch.arange(k.shape[2], device=k.device)
        self.bias = None
        if key_mask is not None:
            masked = ~key_mask.repeat_interleave(k.shape[1], 0)
            self.bias = torch.zeros_like(masked, dtype=k.dtype).masked_fill_(masked, -torch.inf)

    def seen(self, x: Tensor, chunk: _Chunk) -> Tensor:
        return x[chunk.rows].mT

    def masks(self, chunk: _Chunk) -> list[Tensor]:
        block, blocks = self.plan.block, chunk.blocks
        masks = [] if self.bias is None else [self.bias[chunk.rows, None, None, None]]
        begins = self.plan.first + torch.arange(blocks.start * block, blocks.stop * block, device=self.k.device)
        if self.plan.first + blocks.start * block < len(self.places):
            inside = self.places >= begins.view(-1, 1, block, 1)
            masks.append(torch.zeros_like(inside, dtype=self.k.dtype).masked_fill_(inside, -torch.inf))
        return masks

    def accumulate(self, total: Tensor, parts: Tensor, chunk: _Chunk) -> None:
        total[chunk.rows] += parts

    def deliver(self, total: Tensor, out: Tensor) -> None:
        out[:, :, : len(self.places)] += total.unflatten(0, out.shape[:2])


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
        self.plan = plan = _Plan.of(q.shape[2], k.shape[2], left, right, q.shape[1] // k.shape[1])
        self.buffers = _Buffers(q)
        self.scale = scale / LN2
        self.q = self.rows(q)
        self.parts: list[_Keys] = [_Window(plan, self.buffers, k, v, key_mask)]
        num_sinks = min(num_sinks, plan.keys - 1 - plan.left)
        if num_sinks > 0:
            sink_mask = None if key_mask is None else key_mask[:, :num_sinks]
            self.parts.append(_Sinks(plan, self.buffers, k[:, :, :num_sinks], v[:, :, :num_sinks], sink_mask))
        self.chunks = list(plan.chunks(len(self.q), CHUNK.get(q.device.type, 2**25)))

    def rows(self, x: Tensor) -> Tensor:
        """(b h n c) as (R r n' c) with n' in whole blocks."""
        missing = self.plan.blocks * self.plan.block - self.plan.queries
        x = x.reshape(-1, self.plan.group, *x.shape[2:])
        return F.pad(x, (0, 0, 0, missing)) if missing else x

    def restore(self, x: Tensor, like: Tensor) -> Tensor:
        """(R r n' c) as (b h n c), the inverse of `rows`."""
        return x[:, :, : self.plan.queries].reshape(*like.shape[:3], -1)

    def tile(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """A chunk of (R r n' c) as a view (R B r w c)."""
        block, blocks = self.plan.block, chunk.blocks
        part = x[chunk.rows, :, blocks.start * block : blocks.stop * block]
        return part.unflatten(2, (-1, block)).transpose(1, 2)

    def queries(self, chunk: _Chunk) -> Tensor:
        """A chunk of the queries, scaled for scores in powers of 2, (R B r w d)."""
        tile = self.tile(self.q, chunk)
        return torch.mul(tile, self.scale, out=self.buffers("queries", *tile.shape))


@torch.library.custom_op("attnlab::sliding_window_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, left: int, right: int, num_sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm (to base 2) of each query's sum of weights, (b h n 1)."""
    with torch.autocast(q.device.type, enabled=False):
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
            read = functools.reduce(torch.add, (part.read(s, part.v, chunk) for part, s in zip(work.parts, scores)))
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


@torch.library.custom_op("attnlab::sliding_window_backward", mutates_args=())
def _backward(
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
    """The gradients of q, k and v."""
    with torch.autocast(q.device.type, enabled=False):
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
        for part, (part_k, part_v) in zip(work.parts, gradients):
            part.deliver(part_k.mul_(LN2), dk)  # the queries were scaled for powers of 2
            part.deliver(part_v, dv)
    return work.restore(dq.mul_(scale), q).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _backward_chunk(
    work: _Work, chunk: _Chunk, dout: Tensor, inner: Tensor, logsum: Tensor, gradients: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Add a chunk's gradients of keys and values, and return that of its queries, unscaled, (all rows, d)."""
    queries = work.queries(chunk)
    tile = work.tile(dout, chunk)
    dout = work.buffers("dout", *tile.shape).copy_(tile)
    inner, logsum = (work.tile(x, chunk).reshape(-1, 1) for x in (inner, logsum))
    dq = []
    for part, (dk, dv) in zip(work.parts, gradients):
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
