"""Tile attention, a run of tiles at a time in buffers that stay in cache, with an explicit backward.

Keys and values are gathered for a run alone and scores never leave it: what is kept is the output and the log-sum-exp. Backward
computes the weights of a run again. Exponentials are powers of 2; see `attnlab.ops.sliding_window.eager`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnlab.ops.chunks import full_precision
from attnlab.ops.tile_attention.inputs import Given, Inputs
from attnlab.ops.tile_attention.work import LOG2E, Run, Work

LN2 = math.log(2)
INF = float("inf")


@full_precision
def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of every tile."""
    q, v, queries = inputs.q, inputs.v, inputs.queries
    work = Work(inputs)
    out = work.q.new_zeros(work.total, work.x, v.shape[-1])
    lse = work.q.new_full((work.total, work.x, 1), -INF)
    lowest = torch.finfo(lse.dtype).min
    for run in work.runs():
        scores = work.scores(run, *_pairs(work, run))
        # The lowest number, where there is no key: weights are then 0 and not exp(inf - inf).
        top = scores.amax(-1, keepdim=True).clamp_min_(lowest)
        scores.sub_(top).exp2_()
        # A query with a key has a weight of 1.
        total = scores.sum(-1, keepdim=True).clamp_min_(1)
        values = work.keys_of(run, "values", work.v)
        tile = torch.bmm(scores, values, out=work.buffers("out", *scores.shape[:2], v.shape[-1])).div_(total)
        logsum = total.log2_().add_(top).mul_(LN2)
        nothing = top == lowest
        if not work.every_query:
            nothing |= run.query_places.unsqueeze(-1) < 0
        lse[run.rows] = logsum.masked_fill_(nothing, -INF)
        out[run.rows] = tile.masked_fill_(nothing, 0)
    shape = (*q.shape[:2], *queries.shape[2:])
    return out.view(*shape, -1).to(q.dtype), lse.view(shape)


def _pairs(work: Work, run: Run) -> tuple[Tensor, Tensor]:
    """The queries of a run, scaled for scores in powers of 2, and its keys."""
    queries = work.read("queries", work.q, run.queries, work.x).mul_(work.scale * LOG2E)
    return queries, work.keys_of(run, "keys", work.k)


@full_precision
def backward(inputs: Inputs, given: Given, to_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the bias (empty without ``to_bias``)."""
    q, k, v, bias = inputs.q, inputs.k, inputs.v, inputs.bias
    out, lse, dout, dlse = given
    work = Work(inputs)
    dq, dk, dv = (torch.zeros_like(x) for x in (work.q, work.k, work.v))
    dbias = torch.zeros_like(work.bias) if to_bias and work.bias is not None else work.q.new_empty(0)
    dout = dout.to(work.q.dtype).flatten(0, 2)
    nothing = (lse == -INF).flatten(0, 2).unsqueeze(-1)
    inner = ((dout * out.flatten(0, 2)).sum(-1, keepdim=True) - dlse.flatten(0, 2).unsqueeze(-1)).masked_fill_(nothing, 0)
    logsum = (lse.flatten(0, 2).unsqueeze(-1) * LOG2E).masked_fill_(nothing, INF)  # weights of 0
    for run in work.runs():
        tile_q, tile_k = _pairs(work, run)
        weights = work.scores(run, tile_q, tile_k).sub_(logsum[run.rows]).exp2_()
        came, values = dout[run.rows], work.keys_of(run, "values", work.v)
        _add(dv, run, torch.bmm(weights.mT, came, out=work.buffers("to values", *values.shape)))
        dscores = torch.bmm(came, values.mT, out=work.buffers("dscores", *weights.shape))
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
    dq.mul_(work.scale)
    return dq.view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), dbias


def _add(gradient: Tensor, run: Run, tile: Tensor) -> None:
    """Add what a run gives its keys, (c, y, width), to the gradient of all."""
    if run.no_key is not None:
        tile.masked_fill_(run.no_key.unsqueeze(-1), 0)
    gradient.index_add_(0, run.keys, tile.flatten(0, 1))
