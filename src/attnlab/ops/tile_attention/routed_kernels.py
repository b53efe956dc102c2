"""Routed attention as a custom operator: which tiles there are is data, so they are made in it, in either direction.

Backward needs no parts: with a query's output and log-sum-exp over all of its blocks a tile's weights are those of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.partials import Partial
from attnlab.ops.tile_attention.frame import implementation
from attnlab.ops.tile_attention.inputs import Given, Inputs

QUERIES = 64
"""Queries of a tile, at most: a block that many queries choose is cut into several tiles."""


def tiles_of(
    chosen: Bool[Tensor, "b h n c"], blocks: Int[Tensor, "c y"]
) -> tuple[Int[Tensor, "b h t x"], Int[Tensor, "b h t y"]]:
    """The queries of each tile, in order, and its keys, -1 for none; as many tiles as the head with the most needs."""
    b, h, n, count = chosen.shape
    size = min(QUERIES, n)
    row, query = chosen.mT.reshape(-1, n).nonzero().unbind(1)
    number = torch.bincount(row, minlength=b * h * count)
    tiles = ((number + size - 1) // size).view(b * h, count)
    room = max(1, int(tiles.sum(1).max()))
    head = torch.arange(b * h, device=chosen.device).unsqueeze(1)
    first = (tiles.cumsum(1) - tiles + head * room).flatten() * size
    place = torch.arange(len(row), device=chosen.device) + (first - number.cumsum(0) + number)[row]
    queries = row.new_full((b, h, room, size), -1)
    queries.view(-1)[place] = query
    block = row.new_full((b, h, room), -1)
    block.view(-1)[place // size] = row % count
    return queries, torch.where((block < 0).unsqueeze(-1), -1, blocks[block.clamp(min=0)])


def merged(parts: Partial, queries: Int[Tensor, "b h t x"], length: int) -> Partial:
    """The parts of each query as one."""
    b, h, _, e = *parts.output.shape[:2], 0, parts.output.shape[-1]
    place = queries.flatten(2)
    real = place >= 0
    place = place.clamp(min=0)
    lse = parts.lse.flatten(2)
    present = real & (lse > float("-inf"))
    top = lse.new_full((b, h, length), float("-inf")).scatter_reduce(2, place, lse.detach(), "amax")
    shift = top.masked_fill(top == float("-inf"), 0.0)
    weight = (lse.masked_fill(~present, 0.0) - shift.gather(2, place)).exp().masked_fill(~present, 0.0)
    total = torch.zeros_like(top).scatter_add(2, place, weight)
    some = total > 0
    total = total.masked_fill(~some, 1.0)
    share = (weight / total.gather(2, place)).unsqueeze(-1).to(parts.output.dtype)
    row = place + torch.arange(b * h, device=place.device).view(b, h, 1) * length
    output = parts.output.new_zeros(b * h * length, e)
    output = output.index_add(0, row.flatten(), (parts.output.flatten(2, 3) * share).flatten(0, 2))
    return Partial(output.view(b, h, length, e), (total.log() + shift).masked_fill(~some, float("-inf")))


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, blocks: Tensor, key_mask: Tensor | None, causal: bool, scale: float
) -> Inputs:
    queries, keys = tiles_of(chosen, blocks)
    return Inputs(q, k, v, queries, keys, None, None, key_mask, causal, False, scale)


@torch.library.custom_op(
    "attnlab::routed_attention_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor chosen, Tensor blocks, Tensor? key_mask, bool causal, float scale, "
    "str backend) -> (Tensor, Tensor)",
)
def forward(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    chosen: Bool[Tensor, "b h n c"],
    blocks: Int[Tensor, "c y"],
    key_mask: Bool[Tensor, "b m"] | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of each query; see `attnlab.ops.tile_attention.routed`. ``backend`` is "eager" or "triton"."""
    inputs = _inputs(q, k, v, chosen, blocks, key_mask, causal, scale)
    output, lse = merged(Partial(*implementation(backend).forward(inputs)), inputs.queries, q.shape[2])
    return output, lse


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op(
    "attnlab::routed_attention_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor chosen, Tensor blocks, Tensor? key_mask, Tensor out, Tensor lse, Tensor dout, "
    "Tensor dlse, bool causal, float scale, str backend) -> (Tensor, Tensor, Tensor)",
)
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    blocks: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    inputs = _inputs(q, k, v, chosen, blocks, key_mask, causal, scale)
    queries = inputs.queries
    first = torch.arange(len(q) * q.shape[1], device=q.device).view(*q.shape[:2], 1, 1) * q.shape[2]
    row = (queries.clamp(min=0) + first).flatten()
    given = Given(*(x.flatten(0, 2).index_select(0, row).view(*queries.shape, *x.shape[3:]) for x in (out, lse, dout, dlse)))
    given = given._replace(lse=given.lse.masked_fill_(queries < 0, float("-inf")))
    dq, dk, dv, _ = implementation(backend).backward(inputs, given, False)
    return dq, dk, dv


@backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, causal, scale, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = (causal, scale, backend)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *arguments, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    return *backward(*arguments, out, lse, dout, dlse, *ctx.options), None, None, None, None, None, None


forward.register_autograd(_differentiate, setup_context=_save)
