"""Leaky integrate-and-fire neurons, and a layer of them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.masks import check_mask
from attnlab.mixers.parts.conv_bn import ConvBN
from attnlab.ops.chunks import full_precision

SURROGATES = ("sigmoid", "arctan")


def spike(excess: Float[Tensor, "*s"], surrogate: str = "sigmoid", alpha: float | int = 4.0) -> Float[Tensor, "*s"]:
    r"""$[u \ge 0]$ forward, backward the derivative of $\sigma(\alpha u)$ or of $\arctan(\pi \alpha u / 2) / \pi$.

    Args:
        excess: u.
        surrogate: "sigmoid" or "arctan".
        alpha: steepness.
    """
    smooth = torch.sigmoid(alpha * excess) if surrogate == "sigmoid" else torch.atan(0.5 * math.pi * alpha * excess) / math.pi
    return (excess >= 0).to(excess.dtype) + (smooth - smooth.detach())


class LIF(nn.Module):
    r"""Leaky integrate-and-fire neurons over time steps, hard reset to 0 (as in Zhou et al. 2022, Spikformer, and its code).

    $$H_t = V_{t-1} + (I_t - V_{t-1}) / \tau, \qquad S_t = [H_t \ge \theta], \qquad V_t = H_t (1 - S_t), \qquad V_0 = 0$$

    The step's gradient is that of a surrogate, see `spike`; through the reset's S there is none. Nothing is kept between calls:
    every call begins at rest.

    Args:
        tau: $\tau \ge 1$, time constant, which the input is divided by too.
        threshold: $\theta > 0$.
        surrogate: "sigmoid" or "arctan".
        alpha: its steepness.

    Raises:
        ValueError: for a number out of range, or an unknown surrogate.
    """

    def __init__(
        self,
        *,
        tau: float | int = 2.0,
        threshold: float | int = 1.0,
        surrogate: str = "sigmoid",
        alpha: float | int = 4.0,
    ) -> None:
        super().__init__()
        if surrogate not in SURROGATES:
            raise ValueError(f"surrogate: expected one of {SURROGATES}, got {surrogate!r}")
        if tau < 1:
            raise ValueError(f"tau: expected at least 1, got {tau}")
        for name, value in (("threshold", threshold), ("alpha", alpha)):
            if value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self.tau, self.threshold, self.surrogate, self.alpha = tau, threshold, surrogate, alpha

    def forward(self, current: Float[Tensor, "t *s"]) -> Float[Tensor, "t *s"]:
        """Spikes, 0 or 1, of each step."""
        voltage, spikes = torch.zeros_like(current[0]), []
        for step in current:
            voltage = voltage + (step - voltage) / self.tau
            fired = spike(voltage - self.threshold, self.surrogate, self.alpha)
            voltage = voltage * (1.0 - fired.detach())
            spikes.append(fired)
        return torch.stack(spikes)


def check_steps(x: Float[Tensor, "..."], width: int, mask: Bool[Tensor, "..."] | None) -> None:
    """Refuse what is not (steps, batch, tokens, ``width``) with at least one step, and a mask that is not (batch, tokens)."""
    if x.dim() != 4 or x.shape[0] < 1 or x.shape[3] != width:
        raise ValueError(f"x: expected (steps, batch, tokens, {width}) with at least one step, got shape {tuple(x.shape)}")
    check_mask("mask", mask, tuple(x.shape[1:3]))


class SpikingLinear(nn.Module):
    r"""$\mathrm{LIF}(\mathrm{BN}(W x + b))$ over time steps; steps and examples are one batch to the norm.

    Masked tokens are not in the statistics and do not spike. Under autocast it runs in the parameters' precision: a threshold
    makes whole spikes out of rounding errors.

    Args:
        channels: of the input.
        out_channels: of the output.
        neuron: of the output.
        bias: whether b is there.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        neuron: LIF,
        *,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = ConvBN(channels, out_channels, rank=1, bias=bias, device=device, dtype=dtype)
        self.neuron = neuron

    @full_precision
    def forward(self, x: Float[Tensor, "t b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "t b n e"]:
        """Spikes of each step."""
        steps, batch, n, _ = x.shape
        rows = None if mask is None else mask.expand(steps, -1, -1).flatten(0, 1)
        current = self.linear(x.flatten(0, 1).to(self.linear.conv.weight.dtype), (n,), rows)
        return self.neuron(current.unflatten(0, (steps, batch)))
