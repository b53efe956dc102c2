"""Layers around a mechanism in recorded blocks, from their recorded parameters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The linear layer ``name``."""
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def layer_norm(weights: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    """The layer norm ``name``."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def mlp(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """``name.fc1``, exact GELU, ``name.fc2``."""
    return linear(weights, f"{name}.fc2", F.gelu(linear(weights, f"{name}.fc1", x)))
