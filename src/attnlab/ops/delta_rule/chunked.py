r"""The chunked (WY) form of the delta rule and its gradient, for tensors (heads, n, width).

In a chunk that begins in state $S$, with $Q$ (scaled), $K, V$ the rows of its tokens and $\bar K = \mathrm{diag}(\beta) K$,

$$T = (I + \mathrm{stril}(K \bar K^\top))^{-1}, \quad E = T(V - KS), \quad A = \mathrm{tril}(Q \bar K^\top),$$
$$O = QS + AE, \quad S' = S + \bar K^\top E .$$

Row i of $E$ is the error $v_i - S_{i-1}^\top k_i$. The chunks of a tile meet only in
$S' = (I - \bar K^\top W) S + \bar K^\top U$ with $W = TK$, $U = TV$, one small product each; all else is batched.
Backward, with the gradient $R'$ of the state after the chunk,

$$dE = A^\top dO + \bar K R', \quad dX = T^\top dE = dV, \quad R = (I - \bar K^\top W)^\top R' + (Q - AW)^\top dO,$$

and with $G = [\mathrm{tril}(dO\,E^\top); -\mathrm{stril}(dX\,E^\top)]$, the semicolon stacking rows,

$$[dQ; dK] = [dO; -dX]\, S^\top + G \bar K, \quad d\bar K = G^\top [Q; K] + E R'^\top .$$
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.chunks import blocks, full_precision, head_groups, land, landing, room_for_starts, segments

CHUNK = 32  # tokens: the triangular systems are solved one by one, so that small ones are cheaper
TILE = 8  # chunks
GROUP = 8  # heads in a tile: the states of all of them advance in one product

Rows = Float[Tensor, "bh n d"]
Chunks = Float[Tensor, "chunks size _"]
States = Float[Tensor, "bh d e"]
Maps = Float[Tensor, "chunks d _"]


class Tiles(NamedTuple):
    """The chunks of a tile of q, k, v, beta, or of their gradients."""

    q: Float[Tensor, "chunks size d"]
    k: Float[Tensor, "chunks size d"]
    v: Float[Tensor, "chunks size e"]
    beta: Float[Tensor, "chunks size 1"]


class Solved(NamedTuple):
    """What a tile's chunks are before a state is known; the names are those of the equations above."""

    both: Float[Tensor, "chunks size2 d"]  # Q above K
    write: Float[Tensor, "chunks size d"]  # K bar
    scores: Float[Tensor, "chunks size size"]  # A
    inverse: Float[Tensor, "chunks size size"]  # T
    erase: Float[Tensor, "chunks size d"]  # W
    transition: Float[Tensor, "chunks d d"]  # I - K bar' W


def groups(q: Rows) -> list[slice]:
    """Heads that a tile takes together: all on a GPU."""
    return head_groups(q.shape[0], q.shape[0] if q.is_cuda else GROUP)


@full_precision
def forward(
    q: Rows, k: Rows, v: Float[Tensor, "bh n e"], beta: Float[Tensor, "bh n 1"], state: States, scale: float
) -> tuple[Float[Tensor, "bh n e"], States, Float[Tensor, "bh starts d e"]]:
    """Output, state after the last token, and the states before all segments but the first, which `backward` starts from."""
    plan = segments(q.shape[1], CHUNK, TILE)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    last = torch.empty_like(state, memory_format=torch.contiguous_format)
    starts = state.new_empty(state.shape[0], room_for_starts(q.shape[1], CHUNK, TILE), *state.shape[1:])
    for heads in groups(q):
        current = state[heads]
        for number, segment in enumerate(plan):
            if number:
                starts[heads, number - 1] = current
            tiles = Tiles(*(blocks(x, heads, segment) for x in (q, k, v, beta)))
            solved = _solve(tiles, scale)
            states, errors = _states_and_errors(solved, tiles.v, current)
            out = landing(o, heads, segment)
            torch.bmm(solved.both[:, : segment.size], _before(states), out=out)
            out.baddbmm_(solved.scores, errors)
            land(out, o, heads, segment)
            current = states[-1]
        last[heads] = current
    return o, last, starts


@full_precision
def backward(
    grad_o: Float[Tensor, "bh n e"],
    grad_last: States,
    q: Rows,
    k: Rows,
    v: Float[Tensor, "bh n e"],
    beta: Float[Tensor, "bh n 1"],
    state: States,
    starts: Float[Tensor, "bh starts d e"],
    scale: float,
) -> tuple[Rows, Rows, Float[Tensor, "bh n e"], Float[Tensor, "bh n 1"], States]:
    """Gradients of q, k, v, beta and the initial state."""
    plan = segments(q.shape[1], CHUNK, TILE)
    inputs = (q, k, v, beta)
    grad_q, grad_k, grad_v, grad_beta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    grads = (grad_q, grad_k, grad_v, grad_beta)
    grad_state = torch.empty_like(grad_last, memory_format=torch.contiguous_format)
    for heads in groups(q):
        current = grad_last[heads]
        for number in reversed(range(len(plan))):
            segment = plan[number]
            tiles = Tiles(*(blocks(x, heads, segment) for x in inputs))
            out = Tiles(*(landing(x, heads, segment) for x in grads))
            start = starts[heads, number - 1] if number else state[heads]
            current = _backward_tile(tiles, blocks(grad_o, heads, segment), start, current, scale, out)
            for tile, grad in zip(out, grads, strict=True):
                land(tile, grad, heads, segment)
        grad_state[heads] = current
    return grad_q, grad_k, grad_v, grad_beta, grad_state


def _backward_tile(tiles: Tiles, grad_o: Chunks, start: States, grad_last: States, scale: float, out: Tiles) -> States:
    """Write the gradients of q, k, v, beta to ``out`` and return that of the state before the tile."""
    (q, k, v, beta), (grad_q, grad_k, grad_v, grad_beta) = tiles, out
    size = q.shape[1]
    solved = _solve(tiles, scale)
    states, errors = _states_and_errors(solved, v, start)
    readers = torch.baddbmm(solved.both[:, :size], solved.scores, solved.erase, alpha=-1)
    grad_states = _recur(solved.transition.mT, torch.bmm(readers.mT, grad_o), grad_last, reverse=True)
    grad_after = _after(grad_states)

    grad_errors = torch.bmm(solved.scores.mT, grad_o).baddbmm_(solved.write, grad_after)
    torch.bmm(solved.inverse.mT, grad_errors, out=grad_v)
    pair = torch.cat([grad_o, -grad_v], 1)
    grad_grams = torch.bmm(pair, errors.mT)
    grad_grams[:, :size].tril_()
    grad_grams[:, size:].tril_(-1)
    grad_both = torch.bmm(pair, _before(states).mT).baddbmm_(grad_grams, solved.write)
    grad_write = torch.bmm(grad_grams.mT, solved.both).baddbmm_(errors, grad_after.mT)
    torch.mul(grad_both[:, :size], scale, out=grad_q)
    torch.addcmul(grad_both[:, size:], beta, grad_write, out=grad_k)
    torch.sum(grad_write.mul_(k), -1, keepdim=True, out=grad_beta)
    return grad_states[0]


def _solve(tiles: Tiles, scale: float) -> Solved:
    """All that needs no state."""
    q, k, _, beta = tiles
    size, width = q.shape[1:]
    both, write = torch.cat([q * scale, k], 1), k * beta
    grams = torch.bmm(both, write.mT)
    # The solver reads the strictly lower part alone, so that what stands above it needs no masking.
    one = torch.eye(size, dtype=q.dtype, device=q.device)
    inverse = torch.linalg.solve_triangular(grams[:, size:], one, upper=False, unitriangular=True)
    erase = torch.bmm(inverse, k)
    transition = torch.baddbmm(torch.eye(width, dtype=q.dtype, device=q.device), write.mT, erase, alpha=-1)
    return Solved(both, write, grams[:, :size].tril_(), inverse, erase, transition)


def _states_and_errors(solved: Solved, v: Chunks, start: States) -> tuple[Float[Tensor, "chunks_1 g d e"], Chunks]:
    """States before every chunk and after the last, and E."""
    errors = torch.bmm(solved.inverse, v)
    states = _recur(solved.transition, torch.bmm(solved.write.mT, errors), start)
    return states, errors.baddbmm_(solved.erase, _before(states), alpha=-1)


def _recur(transition: Maps, term: Maps, edge: States, reverse: bool = False) -> Float[Tensor, "chunks_1 g d e"]:
    """$S_{i+1} = P_i S_i + R_i$ from ``edge`` on, or $S_i = P_i S_{i+1} + R_i$ from ``edge`` back."""
    heads = edge.shape[0]
    maps = transition.unflatten(0, (heads, -1)).unbind(1)
    terms = term.unflatten(0, (heads, -1)).unbind(1)
    count = len(maps)
    memory = edge.new_empty(count + 1, *edge.shape)
    states = memory.unbind(0)
    states[count if reverse else 0].copy_(edge)
    for i in reversed(range(count)) if reverse else range(count):
        source, target = (i + 1, i) if reverse else (i, i + 1)
        torch.baddbmm(terms[i], maps[i], states[source], out=states[target])
    return memory


def _before(states: Float[Tensor, "chunks_1 g d e"]) -> Maps:
    """The state before each chunk, heads outermost as in the tile's chunks."""
    return states[:-1].transpose(0, 1).flatten(0, 1)


def _after(states: Float[Tensor, "chunks_1 g d e"]) -> Maps:
    """The state after each chunk, heads outermost."""
    return states[1:].transpose(0, 1).flatten(0, 1)
