r"""The gradient of chunked flow attention: three rounds backwards, and all of them in one matrix a chunk.

With $x = 1/O$, $y = 1/I$, $w = c\,v$, $h_i = \sigma_i\, do_i / (f I_i)$ and the gradients $\hat\iota, \hat\omega, \iota,
\omega$ of the sums behind $\hat I, \hat O, I, O$, the matrix A of a chunk has the gradient

$$dA = L \odot (h w^\top + \hat\iota x^\top + \iota 1^\top) + U \odot (y \hat\omega^\top + 1 \omega^\top) ,$$

and with the columns of the state before the chunk, $S, s, \kappa, t, \varrho$ (products, sources, keys, sinks, queries), and
those of the gradient of the state after it, R,

$$dQ = dA\,K + [h, \hat\iota, \iota, y, 1]\,[S, s + \epsilon, \kappa + \epsilon, R_t, R_\varrho]^\top, \quad
  dK = dA^\top Q + [w, x, 1, \hat\omega, \omega]\,[R_S, R_s, R_\kappa, t + \epsilon, \varrho + \epsilon]^\top ,$$

and what the readers' $\epsilon$ adds, the same to all channels. A round's gradients of states are sums over the later chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.chunks import blocks, full_precision, land, landing, segments
from attnlab.ops.flow_attention.chunked import (
    CHUNK,
    TILE,
    Blocks,
    Inputs,
    Kept,
    Numbers,
    Rows,
    States,
    cut,
    dot,
    groups,
    scan,
    strengths,
    total,
    triangles,
)


class Incoming(NamedTuple):
    """The output, and the gradients of output, inflow, allocation and competition; of all tokens or of a tile's."""

    o: Float[Tensor, "g n e"]
    grad_o: Float[Tensor, "g n e"]
    inflow: Float[Tensor, "g n"]
    allocation: Float[Tensor, "g n"]
    competition: Float[Tensor, "g n"]


class Outgoing(NamedTuple):
    """Where the gradients of a tile's queries, keys and values are written."""

    q: Float[Tensor, "chunks size d"]
    k: Float[Tensor, "chunks size d"]
    v: Float[Tensor, "chunks size e"]


@full_precision
def backward(
    incoming: Incoming,
    grad_last: States,
    grad_rivals: Float[Tensor, " bh"],
    inputs: Inputs,
    kept: Kept,
    state: States,
    starts: Float[Tensor, "bh starts d e4"],
    eps: float,
) -> tuple[Rows, Rows, Float[Tensor, "bh n e"], States, Float[Tensor, " bh"]]:
    """Gradients of q, k, v, the first state and the first competition."""
    plan = segments(inputs.q.shape[1], CHUNK, TILE)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3]]
    grad_state, grad_competition = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (state, grad_rivals))
    for heads in groups(inputs.q):
        edge, rivals = grad_last[heads], grad_rivals[heads]
        for number in reversed(range(len(plan))):
            segment = plan[number]
            out = Outgoing(*(landing(x, heads, segment) for x in grads))
            start = starts[heads, number - 1] if number else state[heads]
            numbers = Kept(*(cut(x, heads, segment) for x in kept))
            given = Incoming(*(blocks(x, heads, segment) for x in incoming[:2]), *(cut(x, heads, segment) for x in incoming[2:]))
            edge, rivals = _backward_tile(inputs.tile(heads, segment), numbers, given, start, edge, rivals, eps, out)
            for tile, grad in zip(out, grads, strict=True):
                land(tile, grad, heads, segment)
        grad_state[heads], grad_competition[heads] = edge, rivals
    grad_q, grad_k, grad_v = grads
    return grad_q, grad_k, grad_v, grad_state, grad_competition


def _backward_tile(
    tile: Inputs,
    kept: Kept,
    given: Incoming,
    start: States,
    edge: States,
    rivals: Float[Tensor, " g"],
    eps: float,
    out: Outgoing,
) -> tuple[States, Float[Tensor, " g"]]:
    """Write the gradients of q, k, v to ``out``; return those of the state and the competition before the tile."""
    (q, k, v, f, _), e = tile, tile.v.shape[-1]
    lower, upper = triangles(q, k)
    since = q.new_ones(q.shape[1], q.shape[1]).tril_()
    one, x, y = torch.ones_like(f), kept.outflow.reciprocal(), kept.inflow.reciprocal()
    last_read, last_keys, last_sinks, last_queries = edge.split((e + 1, 1, 1, 1), -1)

    # the third round, and the allocation of the second
    through = dot(given.grad_o, given.o)
    conserved_in = (given.allocation * kept.allocation + through).mul_(1.0 - kept.allocation).div_(f)
    h = given.grad_o * (kept.allocation / (kept.inflow * f)).unsqueeze(-1)
    reading, first_read = scan(torch.cat((torch.bmm(q.mT, h), _gathered(q, conserved_in, eps)), -1), last_read, reverse=True)
    torch.bmm(k, reading[..., :e], out=out.v)
    out.v.baddbmm_(lower.mT, h)
    conserved, first_rivals = _competition(tile, kept, given.competition + dot(out.v, v), rivals, since)
    out.v.mul_(kept.competition.unsqueeze(-1))

    # the second round, whose weights are reciprocals of the first one's flows
    sinks, first_sinks = scan(_gathered(k, conserved, eps), last_sinks, reverse=True)
    late_in, late_out = torch.mm(conserved_in, since).mul_(eps), torch.mm(conserved, since).mul_(eps)
    grad_x = lower.mul_(conserved_in.unsqueeze(-1)).sum(1) + dot(k, reading[..., e:].mT).addcmul_(late_in, k.sum(-1))
    grad_y = upper.mul_(conserved.unsqueeze(1)).sum(-1) + dot(q, sinks.mT).addcmul_(late_out, q.sum(-1))
    inflow = (given.inflow - through * y).addcmul_(grad_y, y * y, value=-1).div_(f)
    outflow = (grad_x * x).mul_(x).div_(f).neg_()

    # the first round, and all of them together
    keys, first_keys = scan(_gathered(q, inflow, eps), last_keys, reverse=True)
    queries, first_queries = scan(_gathered(k, outflow, eps), last_queries, reverse=True)
    weighted = v * kept.competition.unsqueeze(-1)
    sums = torch.bmm(k.mT, weighted), total(k, x), k.sum(1).unsqueeze(-1), total(q, y), q.sum(1).unsqueeze(-1)
    before, _ = scan(torch.cat(sums, -1), start)
    before[..., e:] += eps
    reads, writes = _columns(h, conserved_in, inflow), _columns(weighted, x, one)
    late_reads, late_writes = torch.stack((conserved, outflow), -1), torch.stack((y, one), -1)
    flat_q = late_out.mul_(y).addmm_(outflow, since, alpha=eps)
    flat_k = late_in.mul_(x).addmm_(inflow, since, alpha=eps)
    ones = q.new_ones(q.shape[0], q.shape[2], 1)
    grad_scores = torch.bmm(reads, writes.mT).tril_() + torch.bmm(late_writes, late_reads.mT).triu_()
    torch.bmm(grad_scores, k, out=out.q)
    out.q.baddbmm_(_columns(reads, y, one, flat_q), torch.cat((before[..., : e + 2], sinks, queries, ones), -1).mT)
    torch.bmm(grad_scores.mT, q, out=out.k)
    out.k.baddbmm_(_columns(writes, conserved, outflow, flat_k), torch.cat((reading, keys, before[..., e + 2 :], ones), -1).mT)
    return torch.cat((first_read, first_keys, first_sinks, first_queries), -1), first_rivals


def _competition(
    tile: Inputs, kept: Kept, grad: Numbers, edge: Float[Tensor, " g"], since: Float[Tensor, "size size"]
) -> tuple[Numbers, Float[Tensor, " g"]]:
    """The gradients of the sums behind the conserved outflows, and of the competition before the tile."""
    strength = strengths(kept.conserved, tile.real)
    grad_rivals = (grad * kept.competition).div_(kept.rivals).neg_()
    later, first = scan(grad_rivals.sum(-1), edge, reverse=True)
    grads = torch.addmm(later.unsqueeze(-1), grad_rivals, since).addcmul_(grad, tile.number / kept.rivals)
    return grads.mul_(strength).div_(tile.number).masked_fill_(kept.conserved.abs() > 1.0, 0.0), first


def _columns(x: Blocks, *numbers: Numbers) -> Blocks:
    """``x`` and further columns."""
    return torch.cat((x, *(number.unsqueeze(-1) for number in numbers)), -1)


def _gathered(rows: Blocks, grads: Numbers, eps: float) -> Float[Tensor, "chunks d 1"]:
    """What the rows' reads give to the state before their chunk."""
    return total(rows, grads) + eps * grads.sum(-1)[:, None, None]
