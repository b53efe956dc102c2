"""The selective scan as a log-step parallel scan (Blelloch 1990): what many implementations do, here for comparison.

It takes 2 log2(n) vectorised steps instead of n, and pays with tensors of (tokens, channels, states): on a CPU the memory that
these move costs far more than the steps save. It is not a backend; the benchmark and the tests call it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor


def scan(
    x: Inexact[Tensor, "b n e"],
    dt: Inexact[Tensor, "b n e"],
    A: Inexact[Tensor, "e s"],
    B: Inexact[Tensor, "..."],
    C: Inexact[Tensor, "..."],
    initial_state: Inexact[Tensor, "b e s"],
) -> tuple[Inexact[Tensor, "b n e"], Inexact[Tensor, "b e s"]]:
    """The core recurrence; see `reference.scan`. Memory O(n e s)."""
    decay = torch.exp(dt.unsqueeze(-1) * A)
    inputs = x.unsqueeze(-1) * _per_channel(B, len(A))
    states = _Scan.apply(decay, inputs, initial_state)
    return (_per_channel(C, len(A)) * states).sum(-1), states[:, -1]


def _per_channel(weights: Tensor, channels: int) -> Tensor:
    return weights if weights.ndim == 2 else weights.repeat_interleave(channels // weights.shape[2], dim=2)


class _Scan(torch.autograd.Function):
    """``h_t = a_t h_{t-1} + x_t``; its adjoint ``l_t = g_t + conj(a_{t+1}) l_{t+1}`` is the same scan from the other end."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, inputs: Tensor, initial_state: Tensor) -> Tensor:
        states = inputs.clone()
        states[:, 0].addcmul_(decay[:, 0], initial_state)
        _scan_in_place(decay.clone(), states)
        ctx.save_for_backward(decay, states, initial_state)
        return states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states, initial_state = ctx.saved_tensors
        adjoint = gradient.flip(1)
        _scan_in_place(decay.conj().roll(-1, 1).flip(1), adjoint)
        adjoint = adjoint.flip(1)
        before = torch.cat([initial_state.unsqueeze(1), states[:, :-1]], 1)
        return adjoint * before.conj(), adjoint, adjoint[:, 0] * decay[:, 0].conj()


def _scan_in_place(decay: Tensor, states: Tensor) -> None:
    """Turn inputs into states along dim 1, and use up ``decay``: combine neighbours, scan the pairs, fill in between."""
    tokens = states.shape[1]
    if tokens == 1:
        return
    even_decay, odd_decay = decay[:, : tokens - 1 : 2], decay[:, 1::2]
    even, odd = states[:, : tokens - 1 : 2], states[:, 1::2]
    odd.addcmul_(odd_decay, even)
    odd_decay.mul_(even_decay)
    _scan_in_place(odd_decay, odd)
    states[:, 2::2].addcmul_(decay[:, 2::2], odd[:, : (tokens - 1) // 2])
