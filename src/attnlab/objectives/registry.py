"""The registry of objectives and its three verbs."""

from __future__ import annotations

from typing import Any

from attnlab.core.info import Info
from attnlab.core.registry import Registry
from attnlab.objectives.contract import Objective

objectives: Registry[Objective] = Registry("objective", "attnlab.objectives")


def create_objective(name: str, **options: Any) -> Objective:
    """Build a registered objective: ``create_objective("attention_diversity", threshold=2.0)``.

    Raises:
        UnknownNameError: for an unknown name or option; the nearest ones are named.
    """
    return objectives.create(name, **options)


def list_objectives(pattern: str = "*") -> list[str]:
    """Names of objectives that match a shell pattern."""
    return objectives.names(pattern)


def objective_info(name: str) -> Info:
    """Summary and options of an objective."""
    return objectives.info(name)
