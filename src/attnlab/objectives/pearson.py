"""The Pearson loss: an image should go with its target, whatever its gain and offset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.objectives.contract import Objective
from attnlab.objectives.registry import objectives


@objectives.register("pearson", paper="histoformer", partial=True)
class PearsonLoss(Objective):
    r"""How far a prediction is from being correlated with its target (Sun et al. 2024, Histoformer, section 3.4).

    With $\bar x$ and $\bar y$ the deviations of all entries of an example from their mean,

    $$\mathcal{L} = \operatorname{mean}_b \frac{1 - \rho_b}{2}, \qquad
      \rho = \frac{\sum \bar x\, \bar y}{\lVert \bar x \rVert\, \lVert \bar y \rVert + \epsilon}$$

    Hand it the prediction and the target, in this order, (b, ...), or tokens (b, n, c) with a mask. The authors add it to the
    mean absolute error. It does not change with the prediction's gain (if positive) and offset.

    Args:
        eps: $\epsilon$.

    Raises:
        ValueError: for a negative ``eps``; for anything but two tensors of one shape, or a mask that does not fit them.

    Differs from the paper: masked tokens are in no mean and no sum.
    """

    reads: ClassVar[str] = "prediction"

    def __init__(self, *, eps: float = 1e-6) -> None:
        super().__init__()
        if eps < 0:
            raise ValueError(f"eps: expected at least 0, got {eps}")
        self.eps = eps

    def measure(self, layers: Sequence[Tensor], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, ""]:
        """The mean over the examples."""
        if len(layers) != 2 or layers[0].shape != layers[1].shape:
            raise ValueError(f"recorded: expected prediction and target of one shape, got {[tuple(x.shape) for x in layers]}")
        if mask is not None and (layers[0].dim() != 3 or layers[0].shape[:2] != mask.shape):
            raise ValueError(f"mask: expected tokens (b, n, c) of shape {tuple(mask.shape)}, got {tuple(layers[0].shape)}")
        x, y = (_deviations(part, mask) for part in layers)
        rho = (x * y).sum(1) / (torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1) + self.eps)
        return ((1 - rho) / 2).mean()


def _deviations(x: Float[Tensor, "b ..."], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b m"]:
    """From the mean of each example's real entries, 0 at the others."""
    if mask is None:
        flat = x.flatten(1)
        return flat - flat.mean(1, keepdim=True)
    masked = ~mask.unsqueeze(-1).expand_as(x).flatten(1)
    flat = x.flatten(1).masked_fill(masked, 0.0)
    mean = flat.sum(1, keepdim=True) / (~masked).sum(1, keepdim=True).clamp(min=1)
    return (flat - mean).masked_fill(masked, 0.0)
