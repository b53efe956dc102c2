"""Spiking self-attention: binary queries, keys and values of neurons over time steps, multiplied without a softmax."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.parts.spikes import LIF, SpikingLinear, check_steps
from attnlab.ops.chunks import full_precision


@mixers.register(
    "spiking",
    family="spiking",
    paper="spikformer-v2",
    supports=Supports(grid=frozenset({1, 2, 3}), permutation_equivariant=True, batch_coupled=True, discontinuous=True, cost=1.0),
    # Narrow inputs hardly reach the usual thresholds; powers of two make the sums of spikes exact.
    example={"threshold": 0.25, "attention_threshold": 0.125, "scale": 0.25},
)
class SpikingSelfAttention(Mixer):
    r"""Spiking self-attention (Zhou et al. 2024, Spikformer V2; equations as the code of its first version has them).

    For spikes or currents $X_t$ of T steps, each of q, k, v with its own linear map without bias, and one head of width d,

    $$Q, K, V = \mathrm{LIF}(\mathrm{BN}(X W)) \in \{0, 1\}^{T \times n \times d}, \qquad
      A = \mathrm{LIF}_{\theta_a}(s\, Q (K^\top V)), \qquad Y = \mathrm{LIF}(\mathrm{BN}(A W_o + b))$$

    with neurons as in `LIF`. Nothing of size n x n is made: time O(T n C (C + d)), memory O(T n C). ``record`` collects
    "q_spikes", "k_spikes", "v_spikes", "attention_spikes" and "output_spikes" (T, b, n, C), and "spike_rate" (5,), the share of
    ones among the real tokens of each.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always False.
        num_steps: T; `forward` shows the tokens T times and returns the mean of the output spikes over the steps.
        scale: s, fixed: 0.125, or 0.25 for event cameras.
        tau: time constant of all neurons.
        threshold: of all neurons but those of the attention.
        attention_threshold: $\theta_a$.
        surrogate: "sigmoid" or "arctan", whose gradient stands in for that of the step.
        alpha: steepness of the surrogate.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=True``; sum and norm run over all tokens.
        ValueError: for a number out of range, or an unknown surrogate.

    Differs from the paper: whose blocks hand spikes of all steps on; that is `spike`, and `forward`, which maps tokens to tokens,
    surrounds it with the paper's repetition of the image and mean over steps. Masked tokens are not in the statistics of a norm
    and do not spike. In training the norms couple the examples of a batch. Under autocast it runs in the parameters' precision.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        num_steps: int = 4,
        scale: float | int = 0.125,
        tau: float | int = 2.0,
        threshold: float | int = 1.0,
        attention_threshold: float | int = 0.5,
        surrogate: str = "sigmoid",
        alpha: float | int = 4.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        for name, value in (("num_steps", num_steps), ("scale", scale), ("attention_threshold", attention_threshold)):
            if value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        neuron: dict[str, Any] = {"tau": tau, "surrogate": surrogate, "alpha": alpha}
        self.num_steps, self.scale = num_steps, scale
        self.q_proj = SpikingLinear(dim, dim, LIF(threshold=threshold, **neuron), **place)
        self.k_proj = SpikingLinear(dim, dim, LIF(threshold=threshold, **neuron), **place)
        self.v_proj = SpikingLinear(dim, dim, LIF(threshold=threshold, **neuron), **place)
        self.attention_neuron = LIF(threshold=attention_threshold, **neuron)
        self.out_proj = SpikingLinear(dim, dim, LIF(threshold=threshold, **neuron), bias=True, **place)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """The mean of the output spikes when every step shows the same tokens."""
        return self.spike(x.expand(self.num_steps, -1, -1, -1), mask=masks.query).mean(dim=0).to(x.dtype)

    def spike(self, x: Float[Tensor, "t b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "t b n c"]:
        """Output spikes of each step.

        Args:
            x: spikes or currents, (steps, batch, n, dim), of any number of steps.
            mask: (batch, n), True marks a real token; the others do not spike.

        Raises:
            ValueError: for a wrong shape.
        """
        check_steps(x, self.dim, mask)
        maps = {"q": self.q_proj(x, mask), "k": self.k_proj(x, mask), "v": self.v_proj(x, mask)}
        maps["attention"] = self._attend(maps["q"], maps["k"], maps["v"])
        maps["output"] = self.out_proj(maps["attention"], mask)
        for name, spikes in maps.items():
            self.emit(f"{name}_spikes", spikes)
        self.emit("spike_rate", lambda: self._rates(torch.stack(tuple(maps.values())), mask))
        return maps["output"]

    @full_precision
    def _attend(
        self, q: Float[Tensor, "t b n c"], k: Float[Tensor, "t b n c"], v: Float[Tensor, "t b n c"]
    ) -> Float[Tensor, "t b n c"]:
        q, k, v = (rearrange(part, "t b n (h d) -> t b h n d", h=self.num_heads) for part in (q, k, v))
        heads = q @ (k.transpose(-1, -2) @ v) * self.scale
        return self.attention_neuron(rearrange(heads, "t b h n d -> t b n (h d)"))

    @staticmethod
    def _rates(maps: Float[Tensor, "k t b n c"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "k"]:
        real = maps.shape[2] * maps.shape[3] if mask is None else mask.sum().clamp(min=1)
        return maps.sum(dim=(1, 2, 3, 4)) / (real * maps.shape[1] * maps.shape[4])
