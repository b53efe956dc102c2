"""The selective scan in pieces that stay in cache, with an explicit backward: no (tokens, channels, states) tensor exists.

A piece is some tokens of a few sequences. Its decays and inputs are written into buffers that every piece uses again, with
channels last, so that all elementwise work runs along them. Forward keeps the state at the start of each piece; backward
computes the states of a piece again from there before it runs the adjoint recurrence ``l_t = C_t dy_t + a_{t+1} l_{t+1}``
through it. Nothing in here is conjugated: backward treats the scan as a holomorphic map and conjugates what comes in and goes
out, which is PyTorch's convention for complex gradients and does nothing to real ones.

Letters: t tokens of a piece, b sequences, g groups, s states, p channels of a group. Rows are (t b g 1 p), states (t b g s p).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from attnlab.ops.chunks import full_precision

ROOM = 2**19
"""Elements of a buffer: few enough to stay in cache."""

LONGEST, SHORTEST = 128, 16
"""Bounds of a piece: below, calls and the waits of threads for each other cost too much; beyond, nothing is gained."""


def scan(
    x: Inexact[Tensor, "b n e"],
    dt: Inexact[Tensor, "b n e"],
    A: Inexact[Tensor, "e s"],
    B: Inexact[Tensor, "..."],
    C: Inexact[Tensor, "..."],
    initial_state: Inexact[Tensor, "b e s"],
) -> tuple[Inexact[Tensor, "b n e"], Inexact[Tensor, "b e s"]]:
    """The core recurrence; see `reference.scan`. Backward is not differentiable again."""
    if x.shape[1] == 1:
        return _step(x, dt, A, B, C, initial_state)
    y, last, _ = _forward(x, dt, A, B, C, initial_state)
    return y, last


def _step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token, as elementwise operations on the state."""
    x, dt = x[:, 0, :, None], dt[:, 0, :, None]
    exp, rate = _exponential(A)
    state = exp(dt * rate) * state + x * _per_channel(B, A)
    return (state * _per_channel(C, A)).sum(-1)[:, None], state


def _exponential(A: Tensor) -> tuple[Callable[..., Tensor], Tensor]:
    """A function f and rates r with ``f(dt r) = exp(dt A)``.

    On CPUs `torch.exp2` takes a quarter of the time of `torch.exp`, has no slow range, and stays in one thread where little is
    to do; it does not take complex numbers.
    """
    return (torch.exp, A) if A.is_complex() else (torch.exp2, A / math.log(2))


def _per_channel(weights: Tensor, A: Tensor) -> Tensor:
    """(e s) as it is, or one token's (b 1 g s) with each group's row seen by its channels, (b e s)."""
    if weights.ndim == 2:
        return weights
    batch, _, groups, states = weights.shape
    return weights[:, 0, :, None].expand(batch, groups, A.shape[0] // groups, states).flatten(1, 2)


def _group_count(B: Tensor, C: Tensor) -> int:
    return next((weights.shape[2] for weights in (B, C) if weights.ndim == 4), 1)


def _by_group(weights: Tensor, groups: int) -> Tensor:
    """(... e s) as (... g s p), in memory of its own."""
    return weights.unflatten(-2, (groups, -1)).mT.clone(memory_format=torch.contiguous_format)


def _by_channel(weights: Tensor) -> Tensor:
    """(... g s p) as (... e s), the inverse of `_by_group`."""
    return weights.mT.flatten(-3, -2)


def _rows(x: Tensor, groups: int) -> Tensor:
    """A view of (b n e) as (n b g 1 p)."""
    return x.transpose(0, 1).unflatten(-1, (groups, 1, -1))


class _Summed:
    """The gradient of something constant: it sums over tokens and sequences, first by position in the piece."""

    def __init__(self, out: Tensor, like: Tensor) -> None:
        self.out, self.parts = out, torch.zeros_like(like)

    def add(self, piece: slice, states: Tensor, rows: Tensor) -> None:
        """``sum_t states[t, s, p] rows[t, p]``."""
        self.parts[: len(states)].addcmul_(states, rows)

    def finish(self) -> None:
        """Add what was gathered to the gradient in the layout of the argument."""
        self.out.add_(_by_channel(self.parts.sum((0, 1))))


class _PerToken:
    """The gradient of per-token weights, written in place."""

    def __init__(self, out: Tensor) -> None:
        self.out = out.transpose(0, 1).unsqueeze(-1)

    def add(self, piece: slice, states: Tensor, rows: Tensor) -> None:
        """``sum_p states[t, s, p] rows[t, p]`` for each token."""
        self.out[piece] = torch.bmm(states.flatten(0, 2), rows.flatten(0, 2).mT).unflatten(0, states.shape[:3])

    def finish(self) -> None:
        """Nothing is left to do."""


class _Weights:
    """B or C: per token, held as (n b g s 1), or constant, held as (g s p)."""

    def __init__(self, weights: Tensor, groups: int, rows: slice) -> None:
        self.per_token = weights.ndim == 4
        self.value = weights[rows].transpose(0, 1).unsqueeze(-1) if self.per_token else _by_group(weights, groups)

    def spread(self, piece: slice, rows: Tensor, out: Tensor) -> None:
        """``out[t, s, p] = weights[t, s] rows[t, p]``."""
        torch.mul(self.value[piece] if self.per_token else self.value, rows, out=out)

    def gather(self, piece: slice, states: Tensor, scratch: Tensor) -> Tensor:
        """``sum_s weights[t, s] states[t, s, p]`` as rows."""
        if self.per_token:
            weights = self.value[piece].flatten(0, 2).mT
            return torch.bmm(weights, states.flatten(0, 2)).unflatten(0, states.shape[:3])
        return torch.mul(states, self.value, out=scratch).sum(-2, keepdim=True)


class _Block:
    """Some sequences of the batch, and the buffers of a piece of them."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, rows: slice) -> None:
        self.groups, self.tokens, self.length = _group_count(B, C), x.shape[1], _piece_length(A)
        self.x, self.dt = _rows(x[rows], self.groups), _rows(dt[rows], self.groups)
        self.A = _by_group(A, self.groups)
        self.exp, self.rate = _exponential(self.A)
        self.B, self.C = _Weights(B, self.groups, rows), _Weights(C, self.groups, rows)
        self.decay = x.new_empty(min(self.length, self.tokens), self.x.shape[1], *self.A.shape)
        self.states = torch.empty_like(self.decay)
        self.decay_steps, self.state_steps = self.decay.unbind(0), self.states.unbind(0)

    def pieces(self) -> list[slice]:
        """The tokens of each piece, in order."""
        return [slice(start, min(start + self.length, self.tokens)) for start in range(0, self.tokens, self.length)]

    def run(self, piece: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        """The decays and the states of a piece, in the buffers, from the ``state`` before it."""
        length = piece.stop - piece.start
        decay, states = self.decay[:length], self.states[:length]
        self.exp(torch.mul(self.dt[piece], self.rate, out=decay), out=decay)
        self.B.spread(piece, self.x[piece], out=states)
        for a, h in zip(self.decay_steps[:length], self.state_steps[:length], strict=True):
            state = h.addcmul_(a, state)
        return decay, states

    def adjoint(self, length: int, steps: Sequence[Tensor], carry: Tensor) -> None:
        """Turn ``C_t dy_t`` in ``steps`` into ``l_t``; ``carry`` is ``a l`` of the piece after, and becomes that of this one."""
        later = steps[length - 1].add_(carry)
        for a, step in zip(reversed(self.decay_steps[1:length]), reversed(steps[: length - 1]), strict=True):
            later = step.addcmul_(a, later)
        torch.mul(self.decay_steps[0], later, out=carry)


def _piece_length(A: Tensor) -> int:
    """Tokens of a piece, such that one sequence's fit in a buffer."""
    return max(SHORTEST, min(LONGEST, ROOM // max(1, A.numel())))


def _blocks(x: Tensor, A: Tensor) -> list[slice]:
    """The batch as slices of as many sequences as fit in a buffer."""
    size = max(1, ROOM // max(1, A.numel() * _piece_length(A)))
    return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]


@torch.library.custom_op(
    "attnlab::selective_scan_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor initial_state) -> (Tensor, Tensor, Tensor)",
)
@full_precision
def _forward(
    x: Inexact[Tensor, "b n e"],
    dt: Inexact[Tensor, "b n e"],
    A: Inexact[Tensor, "e s"],
    B: Inexact[Tensor, "..."],
    C: Inexact[Tensor, "..."],
    initial_state: Inexact[Tensor, "b e s"],
) -> tuple[Inexact[Tensor, "b n e"], Inexact[Tensor, "b e s"], Inexact[Tensor, "pieces b g s p"]]:
    """The outputs, the last state, and the states at the starts of the pieces (pieces b g s p)."""
    y, last, starts = _forward_like(x, dt, A, B, C, initial_state)
    starts[-2:] = 0
    for rows in _blocks(x, A):
        block = _Block(x, dt, A, B, C, rows)
        out, state = _rows(y[rows], block.groups), _by_group(initial_state[rows], block.groups)
        for start, piece in zip(starts, block.pieces(), strict=False):
            decay, states = block.run(piece, start[rows].copy_(state))
            out[piece] = block.C.gather(piece, states, scratch=decay)
            state = states[-1]
        last[rows] = _by_channel(state)
    return y, last, starts


@_forward.register_fake
def _forward_like(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, channels = x.shape
    groups = _group_count(B, C)
    # One or two more than there are pieces: never 1, so that a symbolic length needs no guard.
    starts = x.new_empty(tokens // _piece_length(A) + 2, batch, groups, A.shape[1], channels // groups)
    return x.new_empty(x.shape), x.new_empty(initial_state.shape), starts


@torch.library.custom_op(
    "attnlab::selective_scan_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor starts, Tensor dy, Tensor dlast) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@full_precision
def _backward(
    x: Inexact[Tensor, "b n e"],
    dt: Inexact[Tensor, "b n e"],
    A: Inexact[Tensor, "e s"],
    B: Inexact[Tensor, "..."],
    C: Inexact[Tensor, "..."],
    starts: Inexact[Tensor, "pieces b g s p"],
    dy: Inexact[Tensor, "b n e"],
    dlast: Inexact[Tensor, "b e s"],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients, unconjugated, of x, dt, A, B, C and the initial state."""
    # What is constant over tokens has two axes, and is summed into.
    gradients = tuple(t.new_zeros(t.shape) if t.ndim == 2 else t.new_empty(t.shape) for t in (x, dt, A, B, C, dlast))
    for rows in _blocks(x, A):
        _backward_block(_Block(x, dt, A, B, C, rows), starts[:, rows], dy, dlast, rows, gradients)
    return gradients  # type: ignore[return-value]


def _backward_block(block: _Block, starts: Tensor, dy: Tensor, dlast: Tensor, rows: slice, gradients: Sequence[Tensor]) -> None:
    """Write the gradients of some sequences, and add theirs to what all share."""
    dx, ddt, dA, dB, dC, dstate = gradients
    dy, dx, ddt = (_rows(t[rows], block.groups) for t in (dy, dx, ddt))
    adjoint = torch.empty_like(block.decay)
    steps = adjoint.unbind(0)
    grad_A = _Summed(dA, adjoint)
    grad_B, grad_C = (_Summed(g, adjoint) if g.ndim == 2 else _PerToken(g[rows]) for g in (dB, dC))
    carry = _by_group(dlast[rows], block.groups)
    for number, piece in reversed(list(enumerate(block.pieces()))):
        start = starts[number]
        decay, states = block.run(piece, start)
        part = adjoint[: len(states)]
        grad_C.add(piece, states, dy[piece])
        block.C.spread(piece, dy[piece], out=part)
        block.adjoint(len(states), steps, carry)
        grad_B.add(piece, part, block.x[piece])
        # From here on decay holds l_t a_t h_{t-1}, the gradient of the exponent dt A, and states are scratch.
        decay.mul_(part)
        decay[0].mul_(start)
        decay[1:].mul_(states[:-1])
        dx[piece] = block.B.gather(piece, part, scratch=states)
        grad_A.add(piece, decay, block.dt[piece])
        ddt[piece] = decay.mul_(block.A).sum(-2, keepdim=True)
    for gradient in (grad_A, grad_B, grad_C):
        gradient.finish()
    dstate[rows] = _by_channel(carry)


@_backward.register_fake
def _backward_like(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, dt, A, B, C, dlast))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, dy: Tensor, dlast: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    gradients = _backward(*ctx.saved_tensors, dy.conj(), dlast.conj())
    return tuple(g.conj() for g in gradients)


_forward.register_autograd(_differentiate, setup_context=_save)
