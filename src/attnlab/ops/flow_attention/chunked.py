r"""Flow attention in chunks, for tensors (heads, n, width): all sums of a chunk's own tokens share one matrix.

In a chunk with rows Q, K, V and $A = QK^\top$, L the lower and U the upper triangle with the diagonal, a query sums
$((A \odot L)\,x)_i$ of keys weighted by x, and a key $((A \odot U)^\top y)_j$ of queries weighted by y: ones in the first round
(inflow and outflow), their reciprocals in the second (conserved flows); in the third the queries sum values times competition.
What the chunks before add is read of a state (d, e + 4): its columns are products, sources and keys, which queries read and keys
write, then sinks and queries, the other way round. Within $\langle \cdot, \cdot \rangle$ the sum's $\epsilon$ is added to the
state; the reader's adds $\epsilon$ times the sum of the state's entries, and of those of the chunk's own tokens so far.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.chunks import Segment, blocks, full_precision, head_groups, land, landing, room_for_starts, segments

CHUNK = 64  # tokens
TILE = 64  # chunks

Rows = Float[Tensor, "bh n d"]
Blocks = Float[Tensor, "chunks size _"]
Numbers = Float[Tensor, "chunks size"]
States = Float[Tensor, "bh d e4"]


class Inputs(NamedTuple):
    """Features, values, the number of real tokens up to each (at least 1), and which are real; of all tokens or of a tile's."""

    q: Float[Tensor, "g n d"]
    k: Float[Tensor, "g n d"]
    v: Float[Tensor, "g n e"]
    number: Float[Tensor, "g n"]
    real: Bool[Tensor, "g n"] | None

    def tile(self, heads: slice, segment: Segment) -> Inputs:
        """The chunks of a tile."""
        real = None if self.real is None else cut(self.real, heads, segment)
        q, k, v = (blocks(x, heads, segment) for x in (self.q, self.k, self.v))
        return Inputs(q, k, v, cut(self.number, heads, segment), real)


class Kept(NamedTuple):
    """Numbers of each token for the backward; ``conserved`` is the outflow, ``rivals`` the strengths up to the token."""

    inflow: Float[Tensor, "g n"]
    outflow: Float[Tensor, "g n"]
    conserved: Float[Tensor, "g n"]
    allocation: Float[Tensor, "g n"]
    rivals: Float[Tensor, "g n"]
    competition: Float[Tensor, "g n"]


def cut(x: Tensor, heads: slice, segment: Segment) -> Tensor:
    """The chunks of a tile of a number a token."""
    return x[heads, segment.start : segment.stop].reshape(-1, segment.size)


def groups(q: Rows) -> list[slice]:
    """Heads that a tile takes together: one when the sequence fills a tile, all on a GPU."""
    heads, length = q.shape[:2]
    return head_groups(heads, heads if q.is_cuda else max(1, TILE // max(1, length // CHUNK)))


@full_precision
def forward(
    inputs: Inputs, state: States, competition: Float[Tensor, " bh"], eps: float
) -> tuple[Float[Tensor, "bh n e"], Kept, States, Float[Tensor, " bh"], Float[Tensor, "bh starts d e4"]]:
    """Output, numbers of tokens, state and competition after the last token, and the states before all segments but the first."""
    length = inputs.q.shape[1]
    plan = segments(length, CHUNK, TILE)
    o = torch.empty_like(inputs.v, memory_format=torch.contiguous_format)
    kept = Kept(*(torch.empty_like(inputs.number) for _ in Kept._fields))
    last, last_rivals = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (state, competition))
    starts = state.new_zeros(state.shape[0], room_for_starts(length, CHUNK, TILE), *state.shape[1:])
    for heads in groups(inputs.q):
        current, rivals = state[heads], competition[heads]
        for number, segment in enumerate(plan):
            if number:
                starts[heads, number - 1] = current
            out = landing(o, heads, segment)
            found, current, rivals = _forward_tile(inputs.tile(heads, segment), current, rivals, eps, out)
            land(out, o, heads, segment)
            for x, numbers in zip(kept, found, strict=True):
                region = x[heads, segment.start : segment.stop]
                region.copy_(numbers.view(region.shape))
        last[heads], last_rivals[heads] = current, rivals
    return o, kept, last, last_rivals, starts


def _forward_tile(
    tile: Inputs, state: States, competition: Float[Tensor, " g"], eps: float, out: Blocks
) -> tuple[Kept, States, Float[Tensor, " g"]]:
    """Write the outputs of a tile to ``out``; return the numbers of its tokens, the state after it, and the competition."""
    (q, k, v, f, real), e = tile, tile.v.shape[-1]
    first_products, first_sources, first_keys, first_sinks, first_queries = state.split((e, 1, 1, 1, 1), -1)
    lower, upper = triangles(q, k)
    upto = q.new_ones(q.shape[1], q.shape[1]).triu_()
    q_sum, k_sum = q.sum(-1), k.sum(-1)

    keys, last_keys = scan(k.sum(1).unsqueeze(-1), first_keys)
    queries, last_queries = scan(q.sum(1).unsqueeze(-1), first_queries)
    inflow = (lower.sum(-1) + read(q, keys, eps)).addmm_(k_sum, upto, alpha=eps).div_(f)
    outflow = (upper.sum(-2) + read(k, queries, eps)).addmm_(q_sum, upto, alpha=eps).div_(f)

    x, y = outflow.reciprocal(), inflow.reciprocal()
    sources, last_sources = scan(total(k, x), first_sources)
    sinks, last_sinks = scan(total(q, y), first_sinks)
    conserved_in = read(q, sources, eps) + (lower * x.unsqueeze(1)).sum(-1)
    conserved = read(k, sinks, eps) + (upper * y.unsqueeze(-1)).sum(1)
    allocation = conserved_in.addmm_(k_sum * x, upto, alpha=eps).div_(f).sigmoid_()
    conserved = conserved.addmm_(q_sum * y, upto, alpha=eps).div_(f)
    strength = strengths(conserved, real)
    before, last_rivals = scan(strength.sum(-1), competition)
    rivals = torch.addmm(before.unsqueeze(-1), strength, upto)
    rivals.masked_fill_(rivals == 0, 1.0)  # no real token so far
    rivalry = strength.div_(rivals).mul_(f)

    weighted = v * rivalry.unsqueeze(-1)
    products, last_products = scan(torch.bmm(k.mT, weighted), first_products)
    torch.bmm(q, products, out=out)
    out.baddbmm_(lower, weighted).mul_((allocation / (inflow * f)).unsqueeze(-1))
    last = torch.cat((last_products, last_sources, last_keys, last_sinks, last_queries), -1)
    return Kept(inflow, outflow, conserved, allocation, rivals, rivalry), last, last_rivals


def triangles(q: Blocks, k: Blocks) -> tuple[Float[Tensor, "chunks size size"], Float[Tensor, "chunks size size"]]:
    """Products of a chunk's queries and keys: those with no later key, and those with no later query."""
    scores = torch.bmm(q, k.mT)
    upper = scores * torch.ones_like(scores[0]).triu_()
    return scores.tril_(), upper


def strengths(conserved: Numbers, real: Bool[Tensor, "chunks size"] | None) -> Numbers:
    """What real tokens compete with."""
    strength = conserved.clamp(-1.0, 1.0).exp_()
    return strength if real is None else strength.mul_(real)


def read(x: Blocks, state: Float[Tensor, "chunks d 1"], eps: float) -> Numbers:
    r"""$\langle x_i, s \rangle$ for the state s before each chunk."""
    state = state.mT + eps
    return dot(x, state) + eps * state.sum(-1)


def dot(x: Blocks, y: Float[Tensor, "chunks #size d"]) -> Numbers:
    """Products of rows; a batch of products of a matrix and a vector takes three times as long as these two passes in cache."""
    return (x * y).sum(-1)


def total(x: Blocks, weight: Numbers) -> Float[Tensor, "chunks d 1"]:
    """The weighted sum of each chunk's rows."""
    return (x * weight.unsqueeze(-1)).sum(1).unsqueeze(-1)


def scan(writes: Tensor, edge: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """``edge`` (g, ...) plus the writes (chunks, ...) of all chunks before each, and of all; ``reverse``: after each."""
    groups = edge.shape[0]
    terms = writes.reshape(groups, -1, edge[0].numel())
    count = terms.shape[1]
    others = terms.new_ones(count, count).tril_(-1)
    found = torch.baddbmm(edge.reshape(groups, 1, -1), (others.mT if reverse else others).expand(groups, -1, -1), terms)
    end = 0 if reverse else count - 1
    return found.view(writes.shape), (found[:, end] + terms[:, end]).view(edge.shape)
