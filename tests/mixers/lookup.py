"""A lookup layer by its equation, a token, a chunk and a bit at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def looked_up(layer, x: Tensor) -> Tensor:
    """What ``layer``, a `LookupLinear`, makes of one token."""
    total = torch.zeros(layer.out_features, dtype=x.dtype)
    for k, chunk in enumerate(x.split(layer.tau)):
        row, norm, probability = 0, 0.0, 1.0
        for coordinate in chunk:
            row = 2 * row + (1 if coordinate >= 0 else 0)
            norm = norm + coordinate.abs()
            probability = probability / (1 + torch.exp(-2 * coordinate.abs()))
        weight = norm * probability if layer.weight == "l1_prob" else probability
        total = total + weight * layer.tables[k, row]
    return total if layer.bias is None else total + layer.bias
