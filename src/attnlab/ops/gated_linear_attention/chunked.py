r"""The chunked form of gated linear attention and its gradient, for tensors (heads, n, width).

In a chunk that begins in state $S$, with the weights of `gates`, $A_{rc} = s \sum_i q_{ri} e^{b_{ri} - b_{ci}} k_{ci}$ for
$r \ge c$,

$$O = A V + s (Q \odot e^{b}) S, \qquad S' = \mathrm{diag}(e^{b_C}) S + (K \odot e^{b_C - b})^\top V .$$

Backward with $D = \mathrm{tril}(dO\, V^\top)$ runs $R = \mathrm{diag}(e^{b_C}) R' + s (Q \odot e^b)^\top dO$ from the end. A sum
$b_r$ acts where token r reads and, inversely, where it was written: its gradient is $q_r \odot dq_r - k_r \odot dk_r$; that of
$b_C$ has the row sums of $R' \odot S'$ besides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.chunks import (
    Segment,
    blocks,
    full_precision,
    head_groups,
    land,
    landing,
    room_for_starts,
    segments,
    states_after,
    states_before,
    walk,
)
from attnlab.ops.gates import Gates, bounded, chunk_size, gates

SPAN = 256  # tokens of a segment: a power of 2, whatever the chunks are
GROUP = 8  # heads in a tile: the states of all of them advance in one product

Rows = Float[Tensor, "bh n d"]
Chunks = Float[Tensor, "chunks size _"]
States = Float[Tensor, "bh d e"]
Maps = Float[Tensor, "chunks d e"]


class Inputs(NamedTuple):
    """q, k, v and the logarithms of the decays, or their gradients: whole, or the chunks of a tile."""

    q: Float[Tensor, "_ _ d"]
    k: Float[Tensor, "_ _ d"]
    v: Float[Tensor, "_ _ e"]
    log_decay: Float[Tensor, "_ _ w"]


def plan(inputs: Inputs) -> list[Segment]:
    """Segments of one span, in chunks as long as the decays allow."""
    size = chunk_size(inputs.log_decay)
    return segments(inputs.q.shape[1], size, SPAN // size)


def starts_of(length: int) -> int:
    """Room for the states before all segments but the first: no more than one for the rest of a span, and one to spare."""
    return room_for_starts(length, SPAN, 1) + 1


def groups(q: Rows) -> list[slice]:
    """Heads that a tile takes together: all on a GPU."""
    return head_groups(q.shape[0], q.shape[0] if q.is_cuda else GROUP)


@full_precision
def forward(
    inputs: Inputs, state: States, scale: float
) -> tuple[Float[Tensor, "bh n e"], States, Float[Tensor, "bh starts d e"]]:
    """Output, state after the last token, and the states before all segments but the first, which `backward` starts from."""
    inputs = inputs._replace(log_decay=bounded(inputs.log_decay))
    cut = plan(inputs)
    o = torch.empty_like(inputs.v, memory_format=torch.contiguous_format)
    last = torch.empty_like(state, memory_format=torch.contiguous_format)
    starts = state.new_empty(state.shape[0], starts_of(inputs.q.shape[1]), *state.shape[1:])
    starts[:, len(cut) - 1 :] = 0  # room that no segment needs
    for heads in groups(inputs.q):
        current = state[heads]
        for number, segment in enumerate(cut):
            if number:
                starts[heads, number - 1] = current
            tile = Inputs(*(blocks(x, heads, segment) for x in inputs))
            weights = gates(tile.log_decay, scale)
            states = _recur(weights, torch.bmm((tile.k * weights.write).mT, tile.v), current)
            out = landing(o, heads, segment)
            torch.bmm(tile.q * weights.read, states_before(states), out=out)
            out.baddbmm_(weights.scores(tile.q, tile.k), tile.v)
            land(out, o, heads, segment)
            current = states[-1]
        last[heads] = current
    return o, last, starts


@full_precision
def backward(
    grad_o: Float[Tensor, "bh n e"],
    grad_last: States,
    inputs: Inputs,
    state: States,
    starts: Float[Tensor, "bh starts d e"],
    scale: float,
) -> tuple[Inputs, States]:
    """Gradients of the inputs and of the initial state."""
    inputs = inputs._replace(log_decay=bounded(inputs.log_decay))
    cut = plan(inputs)
    grads = Inputs(*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs))
    grad_state = torch.empty_like(grad_last, memory_format=torch.contiguous_format)
    for heads in groups(inputs.q):
        current = grad_last[heads]
        for number in reversed(range(len(cut))):
            segment = cut[number]
            tile = Inputs(*(blocks(x, heads, segment) for x in inputs))
            out = Inputs(*(landing(x, heads, segment) for x in grads))
            start = starts[heads, number - 1] if number else state[heads]
            current = _backward_tile(tile, blocks(grad_o, heads, segment), start, current, scale, out)
            for part, grad in zip(out, grads, strict=True):
                land(part, grad, heads, segment)
        grad_state[heads] = current
    return grads, grad_state


def _backward_tile(tile: Inputs, grad_o: Chunks, start: States, grad_last: States, scale: float, out: Inputs) -> States:
    """Write the gradients of a tile's inputs to ``out`` and return that of the state before it."""
    (q, k, v, _), (grad_q, grad_k, grad_v, grad_decay) = tile, out
    weights = gates(tile.log_decay, scale)
    written, read = k * weights.write, q * weights.read
    states = _recur(weights, torch.bmm(written.mT, v), start)
    grad_states = _recur(weights, torch.bmm(read.mT, grad_o), grad_last, reverse=True)
    later = states_after(grad_states)

    torch.bmm(grad_o, states_before(states).mT, out=grad_q).mul_(weights.read)
    torch.bmm(v, later.mT, out=grad_k).mul_(weights.write)
    weights.pull(q, k, torch.bmm(grad_o, v.mT), grad_q, grad_k)
    torch.bmm(written, later, out=grad_v)
    grad_v.baddbmm_(weights.scores(q, k).mT, grad_o)
    towards = (q * grad_q).addcmul_(k, grad_k, value=-1)
    grad_decay.copy_(weights.collect(towards, (later * states_after(states)).sum(-1)))
    return grad_states[0]


def _recur(weights: Gates, terms: Maps, edge: States, reverse: bool = False) -> Float[Tensor, "chunks_1 g d e"]:
    """States before every chunk and after the last, or, ``reverse``, their gradients, with ``edge`` at the last."""
    heads = edge.shape[0]
    decays = weights.chunk.unsqueeze(-1).unflatten(0, (heads, -1)).unbind(1)
    parts = terms.unflatten(0, (heads, -1)).unbind(1)

    def step(i: int, source: Tensor, target: Tensor) -> None:
        torch.addcmul(parts[i], decays[i], source, out=target)

    return walk(len(parts), edge, step, reverse=reverse)
