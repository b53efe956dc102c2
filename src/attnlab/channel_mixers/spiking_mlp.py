"""The two-layer perceptron of spiking neurons."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.channel_mixers.contract import ChannelMixer
from attnlab.channel_mixers.registry import channel_mixers
from attnlab.core.grid import Grid
from attnlab.mixers.parts.spikes import LIF, SpikingLinear, check_steps


@channel_mixers.register("spiking_mlp", paper="spikformer-v2")
class SpikingMLP(ChannelMixer):
    r"""$\mathrm{LIF}(\mathrm{BN}(W_2\, \mathrm{LIF}(\mathrm{BN}(W_1 x + b_1)) + b_2))$ over time steps (Zhou et al. 2022).

    The perceptron of Spikformer, neurons as in `LIF`. In training the norms take their statistics over all real tokens, steps and
    examples, so it is refused where a token must not see later ones.

    Args:
        dim: width of the tokens.
        hidden: inner width; by default 4 dim.
        num_steps: T; `forward` shows the tokens T times and returns the mean of the output spikes over the steps.
        tau: time constant of the neurons.
        threshold: of the neurons.
        surrogate: "sigmoid" or "arctan", whose gradient stands in for that of the step.
        alpha: steepness of the surrogate.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a number out of range, or an unknown surrogate.
    """

    per_token = False

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        num_steps: int = 4,
        tau: float | int = 2.0,
        threshold: float | int = 1.0,
        surrogate: str = "sigmoid",
        alpha: float | int = 4.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, 4 * dim if hidden is None else hidden)
        if num_steps < 1:
            raise ValueError(f"num_steps: expected a positive number, got {num_steps}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        neuron: dict[str, Any] = {"tau": tau, "threshold": threshold, "surrogate": surrogate, "alpha": alpha}
        self.num_steps = num_steps
        self.up = SpikingLinear(dim, self.hidden, LIF(**neuron), bias=True, **place)
        self.down = SpikingLinear(self.hidden, dim, LIF(**neuron), bias=True, **place)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "b n c"]:
        """The mean of the output spikes when every step shows the same tokens; ``grid`` makes no difference."""
        return self.spike(x.expand(self.num_steps, -1, -1, -1), mask=mask).mean(dim=0).to(x.dtype)

    def spike(self, x: Float[Tensor, "t b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "t b n c"]:
        """Output spikes of each step, for spikes or currents of any number of steps; masked tokens do not spike."""
        check_steps(x, self.dim, mask)
        return self.down(self.up(x, mask), mask)
