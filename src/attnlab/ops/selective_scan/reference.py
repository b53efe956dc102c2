"""The selective scan as its recurrence reads, token by token: the oracle."""

from __future__ import annotations

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
    r"""$h_t = e^{\mathrm{dt}_t A} \odot h_{t-1} + x_t B_t$ and $y_t = \langle C_t, h_t \rangle$, in the dtype of the inputs.

    Args:
        x: what enters, already multiplied by the step.
        dt: the steps.
        A: the rates of the channels' states.
        B: how a token enters the states, (e s) for all tokens or (b n g s) per token and group of channels.
        C: how the states are read, in either layout.
        initial_state: $h_{-1}$.

    Returns:
        The outputs, and the last state.
    """
    state, outputs = initial_state, []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + x[:, t, :, None] * per_channel(B, t, len(A))
        outputs.append((per_channel(C, t, len(A)) * state).sum(-1))
    return torch.stack(outputs, 1), state


def per_channel(weights: Inexact[Tensor, "..."], t: int, channels: int) -> Inexact[Tensor, "..."]:
    """Token ``t``'s row of ``weights`` for each channel: (e s), or (b e s) with channel c in group c // (e / g)."""
    if weights.ndim == 2:
        return weights
    return weights[:, t].repeat_interleave(channels // weights.shape[2], dim=1)
