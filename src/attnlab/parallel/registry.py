"""The registry of ways to spread a mixer over several devices or processes, and its three verbs."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnlab.core.contract import Mixer
from attnlab.core.info import Info
from attnlab.core.registry import Registry

parallelisms: Registry[nn.Module] = Registry("parallelism", "attnlab.parallel")


def create_parallelism(name: str, mixer: Mixer, **options: Any) -> nn.Module:
    """Spread ``mixer`` in the registered way called ``name``: ``create_parallelism("sequence_parallel", mixer)``.

    Raises:
        UnknownNameError: for an unknown name or option; the nearest ones are named.
    """
    return parallelisms.create(name, mixer=mixer, **options)


def list_parallelisms(pattern: str = "*") -> list[str]:
    """Names of ways to spread a mixer that match a shell pattern."""
    return parallelisms.names(pattern)


def parallelism_info(name: str) -> Info:
    """Summary, paper and options of a way to spread a mixer."""
    return parallelisms.info(name)
