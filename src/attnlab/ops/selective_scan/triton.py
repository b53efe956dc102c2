"""The selective scan on a GPU: the kernels of `kernels` behind a custom op with its own backward.

Forward reads the inputs twice where one program for each block of channels leaves the GPU idle: once to learn what each segment
of tokens adds to the state, all segments at a time, and once to go through it. Only the states at every `CHUNK` tokens are
kept, and only if there will be a backward. In memory no tensor is larger than the inputs, times s / `CHUNK` for s states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.selective_scan import kernels
from attnlab.ops.triton_launch import on_device, packed, power_of_two, segment_length

CHUNK = 8
"""Tokens whose states backward holds in registers."""

WALKERS, LANES = 32, 128
"""Channels of a program that walks, and of one that computes gradients: what channels share is summed over them first."""

SHORTEST = 64
"""Tokens of the shortest segment: its state is as large as the inputs of 16 tokens with 16 states."""


def scan(
    x: Float[Tensor, "b n e"],
    dt: Float[Tensor, "b n e"],
    A: Float[Tensor, "e s"],
    B: Float[Tensor, "..."],
    C: Float[Tensor, "..."],
    initial_state: Float[Tensor, "b e s"],
) -> tuple[Float[Tensor, "b n e"], Float[Tensor, "b e s"]]:
    """The core recurrence; see `reference.scan`. Backward is not differentiable again."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, dt, A, B, C, initial_state))
    y, last, _ = _forward(x, dt, A, B, C, initial_state, keep)
    return y, last


class Weights(NamedTuple):
    """B or C as the kernels take it: constant (s e), or per token (b n g s), with strides of b, n and g."""

    value: Float[Tensor, "..."]
    strides: tuple[int, int, int]
    constant: bool

    @classmethod
    def of(cls, weights: Float[Tensor, "..."]) -> Weights:
        """From (e s) or (b n g s)."""
        if weights.ndim == 2:
            return cls(_states_first(weights), (0, 0, 0), True)
        weights = packed(weights)
        return cls(weights, (weights.stride(0), weights.stride(1), weights.stride(2)), False)


class Cut(NamedTuple):
    """How channels are cut: in ``groups`` of ``width``, each of these in ``blocks`` of ``size`` at most."""

    groups: int
    width: int
    size: int
    blocks: int

    @classmethod
    def of(cls, channels: int, B: Float[Tensor, "..."], C: Float[Tensor, "..."], most: int) -> Cut:
        """Blocks of at most so many channels, each in one group."""
        groups = next((weights.shape[2] for weights in (B, C) if weights.ndim == 4), 1)
        width = channels // groups
        size = min(most, power_of_two(width))
        return cls(groups, width, size, -(-width // size))


def _states_first(states: Float[Tensor, "... e s"]) -> Float[Tensor, "... s e"]:
    """With channels last in memory."""
    return states.mT.contiguous()


class Pass(NamedTuple):
    """A pass through the tokens, or ``reverse``, of states that the ``weights`` write ``x`` to."""

    x: Float[Tensor, "b n e"]
    dt: Float[Tensor, "b n e"]
    rates: Float[Tensor, "s e"]
    weights: Weights
    cut: Cut
    reverse: bool

    def run(
        self,
        first: Float[Tensor, "b s e"],
        readers: Weights | None = None,
        y: Float[Tensor, "b n e"] | None = None,
        kept: Float[Tensor, "b room s e"] | None = None,
    ) -> Float[Tensor, "b s e"]:
        """The state at the end, from ``first``; what ``readers`` read goes to ``y``, the states before chunks to ``kept``."""
        (batch, length, channels), states = self.x.shape, len(self.rates)
        parallel = batch * self.cut.groups * self.cut.blocks
        span = segment_length(self.x, length, parallel, CHUNK, programs=16, shortest=SHORTEST)
        segments = -(-length // span)
        ends = self.x.new_empty(batch, segments, states, channels)
        edges = first
        if segments > 1:
            edges, steps = torch.empty_like(ends), self.x.new_empty(batch, segments, channels)
            self._walk(span, first, edges, steps=steps)
            kernels._carry[(batch, -(-states * channels // 128))](
                edges, steps, self.rates, first, segments, channels, states * channels, REVERSE=self.reverse, BLOCK=128
            )
        self._walk(span, edges, ends, readers=readers, y=y, kept=kept)
        return ends[:, 0 if self.reverse else -1]

    def _walk(
        self,
        span: int,
        edges: Float[Tensor, "..."],
        ends: Float[Tensor, "b segments s e"],
        *,
        steps: Float[Tensor, "b segments e"] | None = None,
        readers: Weights | None = None,
        y: Float[Tensor, "b n e"] | None = None,
        kept: Float[Tensor, "b room s e"] | None = None,
    ) -> None:
        """Launch the kernel of that name."""
        batch, segments, states, channels = ends.shape
        kernels._walk[(batch * segments, self.cut.groups * self.cut.blocks)](
            self.x,
            self.dt,
            self.rates,
            self.weights.value,
            None if readers is None else readers.value,
            edges,
            y,
            kept,
            ends,
            steps,
            *self.x.stride()[:2],
            *self.dt.stride()[:2],
            *self.weights.strides,
            *((0, 0, 0) if readers is None else readers.strides),
            self.x.shape[1],
            segments,
            span,
            0 if kept is None else kept.shape[1],
            channels,
            self.cut.blocks,
            self.cut.width,
            REVERSE=self.reverse,
            LOCAL=steps is not None,
            READ=readers is not None,
            KEEP=kept is not None,
            CONSTANT_WEIGHTS=self.weights.constant,
            CONSTANT_READERS=readers is not None and readers.constant,
            CHUNK=CHUNK,
            BLOCK=self.cut.size,
            STATES=states,
            ROOM=power_of_two(states),
            num_warps=max(1, min(8, power_of_two(states) * self.cut.size // 1024)),
        )


@torch.library.custom_op(
    "attnlab::selective_scan_triton_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor initial_state, bool keep) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    x: Float[Tensor, "b n e"],
    dt: Float[Tensor, "b n e"],
    A: Float[Tensor, "e s"],
    B: Float[Tensor, "..."],
    C: Float[Tensor, "..."],
    initial_state: Float[Tensor, "b e s"],
    keep: bool,
) -> tuple[Float[Tensor, "b n e"], Float[Tensor, "b e s"], Float[Tensor, "b room s e"]]:
    """The outputs, the last state, and if ``keep`` the states at the starts of chunks, with channels last."""
    x, dt = packed(x), packed(dt)
    starts = _room(x, A, keep)
    if keep:
        starts[:, -(-x.shape[1] // CHUNK) :] = 0
    y = x.new_empty(x.shape)
    with on_device(x):
        scanned = Pass(x, dt, _states_first(A), Weights.of(B), Cut.of(A.shape[0], B, C, WALKERS), reverse=False)
        last = scanned.run(_states_first(initial_state), Weights.of(C), y, starts if keep else None)
    return y, last.mT.contiguous(), starts


def _room(x: Tensor, A: Tensor, keep: bool) -> Float[Tensor, "b room s e"]:
    """Room for the states at the starts of chunks, one or two more than there are: a symbolic length needs no guard."""
    return x.new_empty(x.shape[0], x.shape[1] // CHUNK + 2 if keep else 0, A.shape[1], A.shape[0])


@_forward.register_fake
def _forward_fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(initial_state.shape), _room(x, A, keep)


@torch.library.custom_op(
    "attnlab::selective_scan_triton_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor starts, Tensor dy, Tensor dlast) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    x: Float[Tensor, "b n e"],
    dt: Float[Tensor, "b n e"],
    A: Float[Tensor, "e s"],
    B: Float[Tensor, "..."],
    C: Float[Tensor, "..."],
    starts: Float[Tensor, "b room s e"],
    dy: Float[Tensor, "b n e"],
    dlast: Float[Tensor, "b e s"],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C and the initial state."""
    x, dt, dy = packed(x), packed(dt), packed(dy)
    (batch, length, channels), states, chunks = x.shape, A.shape[1], -(-x.shape[1] // CHUNK)
    rates, weights, readers, cut = _states_first(A), Weights.of(B), Weights.of(C), Cut.of(channels, B, C, LANES)
    ends = x.new_empty(batch, chunks, states, channels)
    dx, ddt = x.new_empty(x.shape), x.new_empty(x.shape)
    parts = [
        torch.empty_like(ends) if w.constant else x.new_empty(batch, cut.groups, cut.blocks, chunks * CHUNK, states)
        for w in (weights, readers)
    ]
    with on_device(x):
        back = Pass(dy, dt, rates, readers, Cut.of(channels, B, C, WALKERS), reverse=True)
        dstate = back.run(_states_first(dlast), kept=ends)
        kernels._gradients[(batch * chunks, cut.groups * cut.blocks)](
            x,
            dt,
            dy,
            rates,
            weights.value,
            readers.value,
            starts,
            ends,
            dx,
            ddt,
            *parts,
            *x.stride()[:2],
            *dt.stride()[:2],
            *dy.stride()[:2],
            *weights.strides,
            *readers.strides,
            length,
            chunks,
            starts.shape[1],
            channels,
            cut.blocks,
            cut.width,
            CONSTANT_WEIGHTS=weights.constant,
            CONSTANT_READERS=readers.constant,
            CHUNK=CHUNK,
            BLOCK=cut.size,
            STATES=states,
            num_warps=1,
        )
    dB, dC = (_gathered(part, length) for part in parts)
    return dx, ddt, _gathered(ends, length), dB, dC, dstate.mT.contiguous()


def _gathered(parts: Tensor, length: int) -> Float[Tensor, "..."]:
    """The gradient from its parts: (b chunks s e) of something constant, (b g blocks tokens s) of weights per token."""
    if parts.ndim == 4:
        return parts.sum((0, 1)).mT.contiguous()
    return parts.sum(2)[:, :, :length].transpose(1, 2).contiguous()


@_backward.register_fake
def _backward_fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, dt, A, B, C, dlast))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, dy: Tensor, dlast: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(*ctx.saved_tensors, dy, dlast), None


_forward.register_autograd(_differentiate, setup_context=_save)
