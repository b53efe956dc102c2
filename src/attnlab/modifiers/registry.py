"""The registry of modifiers and its three verbs."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnlab.core.info import Info
from attnlab.core.registry import Registry

modifiers: Registry[nn.Module] = Registry("modifier", "attnlab.modifiers")


def apply_modifier(module: nn.Module, name: str, **options: Any) -> nn.Module:
    """Change ``module`` in place: ``apply_modifier(model, "sigma_reparam", init="keep")``.

    Args:
        module: what is changed, any module of PyTorch.
        name: as `list_modifiers` gives it.
        **options: the modifier's own; `modifier_info(name).options` lists them.

    Returns:
        ``module``, or what stands for it where a modifier exchanges the module itself.

    Raises:
        UnknownNameError: for an unknown name or option; the nearest ones are named.
        TypeError: if ``module`` is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    return modifiers.create(name, module=module, **options)


def list_modifiers(pattern: str = "*", *, family: str | None = None) -> list[str]:
    """Names of modifiers that match a shell pattern and a family."""
    return modifiers.names(pattern, family=family)


def modifier_info(name: str) -> Info:
    """Summary, paper and options of a modifier."""
    return modifiers.info(name)
