"""Uncertainty weighting: several losses with learned weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.objectives.contract import Objective
from attnlab.objectives.registry import objectives


@objectives.register("uncertainty_weighting", paper="dcal")
class UncertaintyWeighting(Objective):
    r"""Losses of several branches, weighed by what is learned of their noise (Kendall et al. 2018, in the form of DCAL).

    $$\mathcal{L} = \frac{1}{2} \sum_i \big(e^{-w_i} \mathcal{L}_i + w_i\big)$$

    with one learned number $w_i$ a loss. For a constant loss the best $w_i$ is $\ln \mathcal{L}_i$. Hand it the losses, in a
    fixed order, or what is emitted under "loss"; its parameters must be in the optimiser. It is the whole loss.

    Args:
        num_losses: how many.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: for less than one loss, another number of them, losses that are not scalars, or a mask.
    """

    reads: ClassVar[str] = "loss"

    def __init__(self, num_losses: int = 3, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if num_losses < 1:
            raise ValueError(f"num_losses: expected at least 1, got {num_losses}")
        self.weight = nn.Parameter(torch.zeros(num_losses, device=device, dtype=dtype))

    def measure(self, layers: Sequence[Tensor], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, ""]:
        """The weighted sum."""
        if mask is not None:
            raise ValueError("mask: expected None, the losses have left padding out already")
        if len(layers) != len(self.weight) or any(loss.dim() for loss in layers):
            shapes = [tuple(loss.shape) for loss in layers]
            raise ValueError(f"recorded: expected {len(self.weight)} scalar losses, got shapes {shapes}")
        return 0.5 * ((-self.weight).exp() * torch.stack(list(layers)) + self.weight).sum()
