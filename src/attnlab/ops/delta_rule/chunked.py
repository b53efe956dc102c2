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

A gate multiplies the state by $e^{g_t}$ before step t. With $b$ its sums within the chunk, what token r reads of token c (in
$T$, $A$ and $G$) is weighed by $e^{b_r - b_c}$ and what it reads of $S$ by $e^{b_r}$; $S'$ has $e^{b_C - b_c}$ of token c and
$e^{b_C}$ of $S$. The gradient of $b_r$ is $q_r \cdot dq_r + k_r \cdot dk_r - \bar k_r \cdot d\bar k_r$, and $b_C$ has
$\langle R', S' \rangle$ besides.
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
from attnlab.ops.gates import SharedGates, bounded

CHUNK = 32  # tokens: the triangular systems are solved one by one, so that small ones are cheaper
TILE = 8  # chunks
GROUP = 8  # heads in a tile: the states of all of them advance in one product

Rows = Float[Tensor, "bh n d"]
Chunks = Float[Tensor, "chunks size _"]
States = Float[Tensor, "bh d e"]
Maps = Float[Tensor, "chunks d _"]


class Inputs(NamedTuple):
    """q, k, v, beta and the gate's logarithm, or their gradients: whole, or the chunks of a tile."""

    q: Float[Tensor, "_ _ d"]
    k: Float[Tensor, "_ _ d"]
    v: Float[Tensor, "_ _ e"]
    beta: Float[Tensor, "_ _ 1"]
    gate: Float[Tensor, "_ _ 1"] | None

    def tile(self, heads: slice, segment: Segment) -> Inputs:
        """The chunks of a tile."""
        gate = None if self.gate is None else blocks(self.gate, heads, segment)
        q, k, v, beta = (blocks(x, heads, segment) for x in self[:4])
        return Inputs(q, k, v, beta, gate)

    def landing(self, heads: slice, segment: Segment) -> Inputs:
        """Where to compute a tile of these."""
        gate = None if self.gate is None else landing(self.gate, heads, segment)
        q, k, v, beta = (landing(x, heads, segment) for x in self[:4])
        return Inputs(q, k, v, beta, gate)

    def bounded(self) -> Inputs:
        """The same with a gate whose sums have differences."""
        return self if self.gate is None else self._replace(gate=bounded(self.gate))

    def like(self) -> Inputs:
        """New memory for the gradients of these."""
        gate = None if self.gate is None else torch.empty_like(self.gate, memory_format=torch.contiguous_format)
        q, k, v, beta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in self[:4])
        return Inputs(q, k, v, beta, gate)

    def land(self, tile: Inputs, heads: slice, segment: Segment) -> None:
        """Bring a computed tile to its place."""
        for part, whole in zip(tile, self, strict=True):
            if part is not None and whole is not None:
                land(part, whole, heads, segment)


class Solved(NamedTuple):
    """What a tile's chunks are before a state is known; the names are those of the equations above."""

    gates: SharedGates | None
    both: Float[Tensor, "chunks size2 d"]  # Q above K
    read: Float[Tensor, "chunks size2 d"]  # Q above K, as they read the state before the chunk
    write: Float[Tensor, "chunks size d"]  # K bar
    push: Float[Tensor, "chunks size d"]  # K bar, as the state after the chunk has it
    scores: Float[Tensor, "chunks size size"]  # A
    inverse: Float[Tensor, "chunks size size"]  # T
    erase: Float[Tensor, "chunks size d"]  # W
    transition: Float[Tensor, "chunks d d"]  # I - K bar' W


def groups(q: Rows) -> list[slice]:
    """Heads that a tile takes together: all on a GPU."""
    return head_groups(q.shape[0], q.shape[0] if q.is_cuda else GROUP)


@full_precision
def forward(
    inputs: Inputs, state: States, scale: float
) -> tuple[Float[Tensor, "bh n e"], States, Float[Tensor, "bh starts d e"]]:
    """Output, state after the last token, and the states before all segments but the first, which `backward` starts from."""
    inputs = inputs.bounded()
    plan = segments(inputs.q.shape[1], CHUNK, TILE)
    o = torch.empty_like(inputs.v, memory_format=torch.contiguous_format)
    last = torch.empty_like(state, memory_format=torch.contiguous_format)
    starts = state.new_empty(state.shape[0], room_for_starts(inputs.q.shape[1], CHUNK, TILE), *state.shape[1:])
    starts[:, len(plan) - 1 :] = 0  # room that no segment needs
    for heads in groups(inputs.q):
        current = state[heads]
        for number, segment in enumerate(plan):
            if number:
                starts[heads, number - 1] = current
            tile = inputs.tile(heads, segment)
            solved = _solve(tile, scale)
            states, errors = _states_and_errors(solved, tile.v, current)
            out = landing(o, heads, segment)
            torch.bmm(solved.read[:, : segment.size], states_before(states), out=out)
            out.baddbmm_(solved.scores, errors)
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
    inputs = inputs.bounded()
    plan = segments(inputs.q.shape[1], CHUNK, TILE)
    grads, grad_state = inputs.like(), torch.empty_like(grad_last, memory_format=torch.contiguous_format)
    for heads in groups(inputs.q):
        current = grad_last[heads]
        for number in reversed(range(len(plan))):
            segment = plan[number]
            out = grads.landing(heads, segment)
            start = starts[heads, number - 1] if number else state[heads]
            current = _backward_tile(inputs.tile(heads, segment), blocks(grad_o, heads, segment), start, current, scale, out)
            grads.land(out, heads, segment)
        grad_state[heads] = current
    return grads, grad_state


def _backward_tile(tile: Inputs, grad_o: Chunks, start: States, grad_last: States, scale: float, out: Inputs) -> States:
    """Write the gradients of a tile's inputs to ``out`` and return that of the state before it."""
    size = tile.q.shape[1]
    solved = _solve(tile, scale)
    gates = solved.gates
    states, errors = _states_and_errors(solved, tile.v, start)
    readers = torch.baddbmm(solved.read[:, :size], solved.scores, solved.erase, alpha=-1)
    grad_states = _recur(solved.transition.mT, torch.bmm(readers.mT, grad_o), grad_last, reverse=True)
    grad_after = states_after(grad_states)

    grad_errors = torch.bmm(solved.scores.mT, grad_o).baddbmm_(solved.push, grad_after)
    torch.bmm(solved.inverse.mT, grad_errors, out=out.v)
    pair = torch.cat([grad_o, -out.v], 1)
    grad_grams = torch.bmm(pair, errors.mT)
    grad_grams[:, :size].tril_()
    grad_grams[:, size:].tril_(-1)
    grad_both, grad_write = torch.bmm(pair, states_before(states).mT), torch.bmm(errors, grad_after.mT)
    if gates is not None:
        grad_grams.unflatten(1, (2, -1)).mul_(gates.within.unsqueeze(1))
        grad_both.unflatten(1, (2, -1)).mul_(gates.read.unsqueeze(1))
        grad_write.mul_(gates.write)
    grad_both.baddbmm_(grad_grams, solved.write)
    grad_write.baddbmm_(grad_grams.mT, solved.both)
    torch.mul(grad_both[:, :size], scale, out=out.q)
    torch.addcmul(grad_both[:, size:], tile.beta, grad_write, out=out.k)
    if gates is not None and out.gate is not None:
        towards = (solved.both * grad_both).unflatten(1, (2, -1)).sum(1).addcmul_(solved.write, grad_write, value=-1)
        out.gate.copy_(gates.collect(towards, (grad_after * states_after(states)).sum(-1)))
    torch.sum(grad_write.mul_(tile.k), -1, keepdim=True, out=out.beta)
    return grad_states[0]


def _solve(tile: Inputs, scale: float) -> Solved:
    """All that needs no state."""
    q, k, _, beta, gate = tile
    size, width = q.shape[1:]
    both, write = torch.cat([q * scale, k], 1), k * beta
    read, push = both, write
    gates = None if gate is None else SharedGates(gate, 1.0)
    grams = torch.bmm(both, write.mT)
    one, left = (torch.eye(length, dtype=q.dtype, device=q.device) for length in (size, width))
    if gates is not None:
        grams.unflatten(1, (2, -1)).mul_(gates.within.unsqueeze(1))
        read = (both.unflatten(1, (2, -1)) * gates.read.unsqueeze(1)).flatten(1, 2)
        push, left = write * gates.write, left * gates.chunk.unsqueeze(-1)
    # The solver reads the strictly lower part alone, so that what stands above it needs no masking.
    inverse = torch.linalg.solve_triangular(grams[:, size:], one, upper=False, unitriangular=True)
    erase = torch.bmm(inverse, read[:, size:])
    transition = torch.baddbmm(left, push.mT, erase, alpha=-1)
    return Solved(gates, both, read, write, push, grams[:, :size].tril_(), inverse, erase, transition)


def _states_and_errors(solved: Solved, v: Chunks, start: States) -> tuple[Float[Tensor, "chunks_1 g d e"], Chunks]:
    """States before every chunk and after the last, and E."""
    errors = torch.bmm(solved.inverse, v)
    states = _recur(solved.transition, torch.bmm(solved.push.mT, errors), start)
    return states, errors.baddbmm_(solved.erase, states_before(states), alpha=-1)


def _recur(transition: Maps, term: Maps, edge: States, reverse: bool = False) -> Float[Tensor, "chunks_1 g d e"]:
    """$S_{i+1} = P_i S_i + R_i$ from ``edge`` on, or $S_i = P_i S_{i+1} + R_i$ from ``edge`` back."""
    heads = edge.shape[0]
    maps = transition.unflatten(0, (heads, -1)).unbind(1)
    terms = term.unflatten(0, (heads, -1)).unbind(1)

    def step(i: int, source: Tensor, target: Tensor) -> None:
        torch.baddbmm(terms[i], maps[i], source, out=target)

    return walk(len(maps), edge, step, reverse=reverse)
