"""The registry of models and its three verbs."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnlab.core.info import Info
from attnlab.core.registry import Registry

models: Registry[nn.Module] = Registry("model", "attnlab.models")


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a registered model: ``create_model("causal_lm", vocab_size=256, dim=64, depth=2, mixer="delta_net")``.

    Raises:
        UnknownNameError: for an unknown model or option; the nearest ones are named.
        UnsupportedError: for a mixer that cannot be what the model needs.
    """
    return models.create(name, **options)


def list_models(pattern: str = "*") -> list[str]:
    """Names of models that match a shell pattern."""
    return models.names(pattern)


def model_info(name: str) -> Info:
    """Summary and options of a model."""
    return models.info(name)
