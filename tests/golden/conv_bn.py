"""Recorded pairs of a convolution and a BatchNorm under the names of our part."""

from __future__ import annotations

import torch
from torch import Tensor

_NAMES = {"c": "conv", "conv": "conv", "bn": "norm"}


def conv_bn(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``PATH.c.weight`` or ``PATH.conv.weight``, and ``PATH.bn.*``, as the state of `ConvBN` at PATH; the rest as it is."""
    found = {}
    for key, value in weights.items():
        path, _, last = key.rpartition(".")
        above, _, layer = path.rpartition(".")
        if layer not in _NAMES:
            found[key] = value
            continue
        new = f"{above}.{_NAMES[layer]}" if above else _NAMES[layer]
        found[f"{new}.{last}"] = value
        if layer == "bn":
            found[f"{new}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return found
