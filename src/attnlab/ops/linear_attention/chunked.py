r"""The chunked form of causal linear attention and its gradient, for tensors (heads, n, width).

In a chunk that begins in state $S$, with $Q, K, V$ the rows of its C tokens, $M_{rc} = s\lambda^{r-c}$ for $r \ge c$ and 0
above, $\Lambda = \mathrm{diag}(s\lambda^r)$ and $\Gamma = \mathrm{diag}(\lambda^{C-r})$,

$$O = (QK^\top \odot M)\,V + \Lambda Q S, \qquad S' = \lambda^C S + (\Gamma K)^\top V .$$

Backward, with $D = dO\,V^\top \odot M$ and the gradient $R'$ of the state after the chunk,

$$dQ = D K + \Lambda\, dO\, S^\top, \quad dK = D^\top Q + \Gamma V R'^\top, \quad dV = (QK^\top \odot M)^\top dO + \Gamma K R',
\quad R = \lambda^C R' + (\Lambda Q)^\top dO .$$

The states of a whole segment are one product of its writes with the powers of $\lambda^C$. What token c adds to token r holds
$\lambda^{r-c}$, and what it adds to the state after the chunk $\lambda^{C-c}$, so that a chunk's part of the gradient of
$\log\lambda$ is $\sum_r r\,(q_r \cdot dq_r - k_r \cdot dk_r) + C\,\langle R', S'\rangle$.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.chunks import blocks, full_precision, head_groups, land, landing, room_for_starts, segments
from attnlab.ops.linear_attention.decay import Decay

CHUNK = 64  # tokens
TILE = 64  # chunks: enough to hide the cost of calling an op, few enough for a core's second-level cache

Rows = Float[Tensor, "bh n d"]
Chunks = Float[Tensor, "chunks size _"]
States = Float[Tensor, "bh d e"]


class Tiles(NamedTuple):
    """The chunks of a tile of q, k, v, or of their gradients."""

    q: Float[Tensor, "chunks size d"]
    k: Float[Tensor, "chunks size d"]
    v: Float[Tensor, "chunks size e"]


def groups(q: Rows) -> list[slice]:
    """Heads that a tile takes together: one when the sequence fills a tile, all on a GPU."""
    heads, length = q.shape[:2]
    return head_groups(heads, heads if q.is_cuda else max(1, TILE // max(1, length // CHUNK)))


@full_precision
def forward(
    q: Rows, k: Rows, v: Float[Tensor, "bh n e"], log_decay: Float[Tensor, " bh"] | None, state: States, scale: float
) -> tuple[Float[Tensor, "bh n e"], States, Float[Tensor, "bh starts d e"]]:
    """Output, state after the last token, and the states before all segments but the first, which `backward` starts from."""
    plan = segments(q.shape[1], CHUNK, TILE)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    last = torch.empty_like(state, memory_format=torch.contiguous_format)
    starts = state.new_empty(state.shape[0], room_for_starts(q.shape[1], CHUNK, TILE), *state.shape[1:])
    starts[:, len(plan) - 1 :] = 0  # room that no segment needs
    for heads in groups(q):
        current, decay = state[heads], None
        for number, segment in enumerate(plan):
            if number:
                starts[heads, number - 1] = current
            if decay is None or decay.within.shape[-1] != segment.size:
                decay = Decay.build(None if log_decay is None else log_decay[heads], q[heads], segment.size, scale)
            tiles = Tiles(*(blocks(x, heads, segment) for x in (q, k, v)))
            out = landing(o, heads, segment)
            current = _forward_tile(tiles, decay, current, out)
            land(out, o, heads, segment)
        last[heads] = current
    return o, last, starts


def _forward_tile(tiles: Tiles, decay: Decay, state: States, out: Chunks) -> States:
    """Write the outputs of a tile to ``out`` and return the state after it."""
    (q, k, v), heads = tiles, state.shape[0]
    states = _scan(torch.bmm(_weigh(k, decay.write, heads).mT, v), state, decay)
    scores = torch.bmm(q, k.mT)
    scores.unflatten(0, (heads, -1)).mul_(decay.within)
    torch.bmm(_weigh(q, decay.read, heads), states[:, :-1].flatten(0, 1), out=out)
    out.baddbmm_(scores, v)
    return states[:, -1]


@full_precision
def backward(
    grad_o: Float[Tensor, "bh n e"],
    grad_last: States,
    q: Rows,
    k: Rows,
    v: Float[Tensor, "bh n e"],
    log_decay: Float[Tensor, " bh"] | None,
    state: States,
    starts: Float[Tensor, "bh starts d e"],
    scale: float,
    needs_decay: bool,
) -> tuple[Rows, Rows, Float[Tensor, "bh n e"], Float[Tensor, " bh"], States]:
    """Gradients of q, k, v, log_decay (zeros unless ``needs_decay``) and the initial state."""
    plan = segments(q.shape[1], CHUNK, TILE)
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    grads = (grad_q, grad_k, grad_v)
    grad_decay = q.new_zeros(q.shape[0])
    grad_state = torch.empty_like(grad_last, memory_format=torch.contiguous_format)
    for heads in groups(q):
        current, decay = grad_last[heads], None
        for number in reversed(range(len(plan))):
            segment = plan[number]
            if decay is None or decay.within.shape[-1] != segment.size:
                decay = Decay.build(None if log_decay is None else log_decay[heads], q[heads], segment.size, scale)
            tiles = Tiles(*(blocks(x, heads, segment) for x in (q, k, v)))
            out = Tiles(*(landing(x, heads, segment) for x in grads))
            grad_out = blocks(grad_o, heads, segment)
            start = starts[heads, number - 1] if number else state[heads]
            states, grad_states = _backward_tile(tiles, grad_out, decay, start, current, out)
            for tile, grad in zip(out, grads, strict=True):
                land(tile, grad, heads, segment)
            if needs_decay:
                grad_decay[heads] += _decay_gradient(tiles, out, states, grad_states)
            current = grad_states[:, 0]
        grad_state[heads] = current
    return grad_q, grad_k, grad_v, grad_decay, grad_state


def _backward_tile(
    tiles: Tiles, grad_o: Chunks, decay: Decay, start: States, grad_last: States, out: Tiles
) -> tuple[Float[Tensor, "g chunks_1 d e"], Float[Tensor, "g chunks_1 d e"]]:
    """Write the gradients of q, k, v to ``out``; return the states before and after every chunk, and their gradients."""
    (q, k, v), (grad_q, grad_k, grad_v) = tiles, out
    heads = start.shape[0]
    written, read = _weigh(k, decay.write, heads), _weigh(q, decay.read, heads)
    states = _scan(torch.bmm(written.mT, v), start, decay)
    grad_states = _scan(torch.bmm(read.mT, grad_o), grad_last, decay, reverse=True)
    before, after = states[:, :-1].flatten(0, 1), grad_states[:, 1:].flatten(0, 1)

    grad_scores = torch.bmm(grad_o, v.mT)
    grad_scores.unflatten(0, (heads, -1)).mul_(decay.within)
    torch.bmm(grad_o, before.mT, out=grad_q)
    _weigh_(grad_q, decay.read, heads).baddbmm_(grad_scores, k)
    torch.bmm(v, after.mT, out=grad_k)
    _weigh_(grad_k, decay.write, heads).baddbmm_(grad_scores.mT, q)
    scores = torch.bmm(q, k.mT, out=grad_scores)
    scores.unflatten(0, (heads, -1)).mul_(decay.within)
    torch.bmm(written, after, out=grad_v)
    grad_v.baddbmm_(scores.mT, grad_o)
    return states, grad_states


def _scan(
    writes: Float[Tensor, "chunks d e"], edge: States, decay: Decay, reverse: bool = False
) -> Float[Tensor, "g chunks_1 d e"]:
    """States before every chunk and after the last, from the chunks' writes; ``reverse`` runs from the end, ``edge`` last."""
    heads, shape = edge.shape[0], edge.shape[1:]
    parts = [edge.unsqueeze(1), writes.unflatten(0, (heads, -1))]
    terms = torch.cat(parts[::-1] if reverse else parts, 1)
    weights = decay.across(terms.shape[1] - 1)
    return torch.bmm(weights.mT if reverse else weights, terms.flatten(2)).unflatten(2, shape)


def _weigh(x: Chunks, weight: Float[Tensor, "#g 1 #size 1"] | None, heads: int) -> Chunks:
    """The rows of each chunk times their weight."""
    return x if weight is None else (x.unflatten(0, (heads, -1)) * weight).flatten(0, 1)


def _weigh_(x: Chunks, weight: Float[Tensor, "#g 1 #size 1"] | None, heads: int) -> Chunks:
    """`_weigh` in place."""
    if weight is not None:
        x.unflatten(0, (heads, -1)).mul_(weight)
    return x


def _decay_gradient(
    tiles: Tiles, grads: Tiles, states: Float[Tensor, "g chunks_1 d e"], grad_states: Float[Tensor, "g chunks_1 d e"]
) -> Float[Tensor, " g"]:
    """What a tile adds to the gradient of the decay's logarithm."""
    (q, k, _), (grad_q, grad_k, _) = tiles, grads
    heads, size = states.shape[0], q.shape[1]
    index = torch.arange(1, size + 1, dtype=q.dtype, device=q.device)
    tokens = (q * grad_q).addcmul_(k, grad_k, value=-1).sum(-1) @ index
    chunks = (states[:, 1:] * grad_states[:, 1:]).sum((1, 2, 3)) * size
    return tokens.unflatten(0, (heads, -1)).sum(1) + chunks
