"""Tile attention, a run of tiles at a time in buffers that stay in cache, with an explicit backward.

Keys and values are gathered for a run alone and scores never leave it: what is kept is the output and the log-sum-exp. Backward
computes the weights of a run again. Exponentials are powers of 2; see `attnlab.ops.sliding_window.eager`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import full_precision
from attnlab.ops.tile_attention.work import LOG2E, Run, Work

LN2 = math.log(2)
INF = float("inf")


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    queries: Int[Tensor, "#b #h t x"],
    keys: Int[Tensor, "#b #h t y"],
    bias: Float[Tensor, "#h kinds x y"] | None,
    kind: Int[Tensor, "t"] | None,
    causal: bool,
    key_mask: Bool[Tensor, "b m"] | None,
    zero_outside: bool,
    scale: float,
) -> tuple[Float[Tensor, "b h t x e"], Float[Tensor, "b h t x"]]:
    """See `reference.attend`. Backward is not differentiable again."""
    return forward(q, k, v, queries, keys, bias, kind, causal, key_mask, zero_outside, scale)


@torch.library.custom_op(
    "attnlab::tile_attention_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor queries, Tensor keys, Tensor? bias, Tensor? kind, bool causal, "
    "Tensor? key_mask, bool zero_outside, float scale) -> (Tensor, Tensor)",
)
@full_precision
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    kind: Tensor | None,
    causal: bool,
    key_mask: Tensor | None,
    zero_outside: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of every tile; the arguments of `attend`."""
    work = Work(q, k, v, queries, keys, bias, kind, causal, key_mask, zero_outside)
    out = work.q.new_empty(work.total, work.x, v.shape[-1])
    lse = work.q.new_empty(work.total, work.x, 1)
    lowest = torch.finfo(lse.dtype).min
    for run in work.runs():
        scores = work.scores(run, *_pairs(work, run, scale))
        # The lowest number, where there is no key: weights are then 0 and not exp(inf - inf).
        top = scores.amax(-1, keepdim=True).clamp_min_(lowest)
        scores.sub_(top).exp2_()
        # A query with a key has a weight of 1.
        total = scores.sum(-1, keepdim=True).clamp_min_(1)
        tile = torch.bmm(scores, work.keys_of(run, "values", work.v), out=out[run.rows]).div_(total)
        logsum = torch.add(top, total.log2_(), out=lse[run.rows]).mul_(LN2)
        nothing = top == lowest
        if not work.every_query:
            nothing |= run.query_places.unsqueeze(-1) < 0
        logsum.masked_fill_(nothing, -INF)
        tile.masked_fill_(nothing, 0)
    shape = (*q.shape[:2], *queries.shape[2:])
    return out.view(*shape, -1).to(q.dtype), lse.view(shape)


def _pairs(work: Work, run: Run, scale: float) -> tuple[Tensor, Tensor]:
    """The queries of a run, scaled for scores in powers of 2, and its keys."""
    queries = work.read("queries", work.q, run.queries, work.x).mul_(scale * LOG2E)
    return queries, work.keys_of(run, "keys", work.k)


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    kind: Tensor | None,
    causal: bool,
    key_mask: Tensor | None,
    zero_outside: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:2], *queries.shape[2:])
    return q.new_empty(*shape, v.shape[-1]), q.new_empty(shape, dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op(
    "attnlab::tile_attention_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor queries, Tensor keys, Tensor? bias, Tensor? kind, Tensor? key_mask, "
    "Tensor out, Tensor lse, Tensor dout, Tensor dlse, bool causal, bool zero_outside, float scale, bool to_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
@full_precision
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    kind: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    causal: bool,
    zero_outside: bool,
    scale: float,
    to_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the bias (empty without ``to_bias``)."""
    work = Work(q, k, v, queries, keys, bias, kind, causal, key_mask, zero_outside)
    dq, dk, dv = (torch.zeros_like(x) for x in (work.q, work.k, work.v))
    dbias = torch.zeros_like(work.bias) if to_bias and work.bias is not None else work.q.new_empty(0)
    dout = dout.to(work.q.dtype).flatten(0, 2)
    nothing = (lse == -INF).flatten(0, 2).unsqueeze(-1)
    inner = ((dout * out.flatten(0, 2)).sum(-1, keepdim=True) - dlse.flatten(0, 2).unsqueeze(-1)).masked_fill_(nothing, 0)
    logsum = (lse.flatten(0, 2).unsqueeze(-1) * LOG2E).masked_fill_(nothing, INF)  # weights of 0
    for run in work.runs():
        tile_q, tile_k = _pairs(work, run, scale)
        weights = work.scores(run, tile_q, tile_k).sub_(logsum[run.rows]).exp2_()
        given, values = dout[run.rows], work.keys_of(run, "values", work.v)
        _add(dv, run, torch.bmm(weights.mT, given, out=work.buffers("to values", *values.shape)))
        dscores = torch.bmm(given, values.mT, out=work.buffers("dscores", *weights.shape))
        dscores.sub_(inner[run.rows]).mul_(weights)
        _add(dk, run, torch.bmm(dscores.mT, tile_q, out=work.buffers("to values", *tile_k.shape)))
        to_q = torch.bmm(dscores, tile_k, out=work.buffers("to queries", *tile_q.shape))
        if not work.every_query:
            to_q.masked_fill_(run.query_places.unsqueeze(-1) < 0, 0)
        dq.index_add_(0, run.queries, to_q.flatten(0, 1))
        if dbias.numel() and run.kinds is not None:
            dbias.index_add_(0, run.kinds, dscores)
    dbias = dbias if not to_bias or bias is None else dbias.view(bias.shape).to(bias.dtype)
    dk.mul_(LN2)  # the queries were scaled for powers of 2
    dq.mul_(scale)
    return dq.view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), dbias


def _add(gradient: Tensor, run: Run, tile: Tensor) -> None:
    """Add what a run gives its keys, (c, y, width), to the gradient of all."""
    if run.no_key is not None:
        tile.masked_fill_(run.no_key.unsqueeze(-1), 0)
    gradient.index_add_(0, run.keys, tile.flatten(0, 1))


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    kind: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    causal: bool,
    zero_outside: bool,
    scale: float,
    to_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if to_bias and bias is not None else lse.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, queries, keys, bias, kind, causal, key_mask, zero_outside, scale = inputs
    ctx.save_for_backward(q, k, v, queries, keys, bias, kind, key_mask, *output)
    ctx.options = (causal, zero_outside, scale)
    ctx.to_bias = bias is not None and bias.requires_grad


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *arguments, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    dq, dk, dv, dbias = backward(*arguments, out, lse, dout, dlse, *ctx.options, ctx.to_bias)
    return dq, dk, dv, None, None, dbias if ctx.to_bias else None, None, None, None, None, None


forward.register_autograd(_differentiate, setup_context=_save)
