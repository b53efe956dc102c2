"""Reducers: from many tokens to fewer, between blocks or at the end of a model; `list_reducers` names them."""

from __future__ import annotations

from attnlab.reducers.contract import Reducer
from attnlab.reducers.registry import create_reducer, list_reducers, reducer_info, reducers

__all__ = ["Reducer", "create_reducer", "list_reducers", "reducer_info", "reducers"]
