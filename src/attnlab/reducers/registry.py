"""The registry of reducers and its three verbs."""

from __future__ import annotations

from typing import Any

from attnlab.core.info import Info
from attnlab.core.registry import Registry
from attnlab.reducers.contract import Reducer

reducers: Registry[Reducer] = Registry("reducer", "attnlab.reducers")


def create_reducer(name: str, dim: int, **options: Any) -> Reducer:
    """Build a registered reducer: ``create_reducer("low_rank_pooling", dim=256, num_heads=5)``.

    Raises:
        UnknownNameError: for an unknown name or option; the nearest ones are named.
    """
    return reducers.create(name, dim=dim, **options)


def list_reducers(pattern: str = "*", *, family: str | None = None) -> list[str]:
    """Names of reducers that match a shell pattern and a family."""
    return reducers.names(pattern, family=family)


def reducer_info(name: str) -> Info:
    """Summary, paper and options of a reducer."""
    return reducers.info(name)
