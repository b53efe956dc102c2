"""How logits become weights: row-wise softmax, and element-wise functions that need no row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Normalizer:
    """Logits to weights.

    Args:
        weights: the function of the logits (..., keys).
        elementwise: whether each weight depends on its own logit alone.
    """

    weights: Callable[[Tensor], Tensor]
    elementwise: bool = True


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1)


def _identity(logits: Tensor) -> Tensor:
    return logits


NORMALIZERS: dict[str, Normalizer] = {
    "softmax": Normalizer(_softmax, elementwise=False),
    "sigmoid": Normalizer(torch.sigmoid),
    "relu": Normalizer(torch.relu),
    "identity": Normalizer(_identity),
}


def masked_weights(
    logits: Float[Tensor, "b h n m"], allowed: Bool[Tensor, "#b #h #n #m"] | None, normalizer: Normalizer
) -> Float[Tensor, "b h n m"]:
    """Weights with exact zeros at pairs that are not allowed; a row without any is 0 and has a zero gradient."""
    if allowed is None:
        return normalizer.weights(logits)
    if normalizer.elementwise:
        return normalizer.weights(logits.masked_fill(~allowed, 0.0)).masked_fill(~allowed, 0.0)
    # A row that allows nothing is normalised as if it allowed everything, then zeroed: no NaN arises that could spread.
    usable = allowed | ~allowed.any(dim=-1, keepdim=True)
    return normalizer.weights(logits.masked_fill(~usable, float("-inf"))).masked_fill(~allowed, 0.0)
