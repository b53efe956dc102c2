"""Executors by name."""

from __future__ import annotations

from typing import Literal, get_args

from attnlab.compare.executor import Executor, Here
from attnlab.compare.machine import available_cores
from attnlab.compare.pool import Pool
from attnlab.compare.ray_executor import RayExecutor
from attnlab.core.errors import UnknownNameError, nearest

ExecutorName = Literal["here", "pool", "ray"]


def choose_executor(name: str | None, workers: int, address: str | None = None) -> Executor:
    """The executor called ``name``; None is a pool of the ``workers``, or this process where there are 0.

    Args:
        name: "here", "pool" or "ray".
        workers: cells at a time; on this machine no more than there are cores.
        address: of a Ray cluster.

    Raises:
        UnknownNameError: for another name.
        ValueError: for an address without Ray, or no workers where some are needed.
        MissingPackageError: Ray is not installed.
    """
    known = get_args(ExecutorName)
    if name is not None and name not in known:
        raise UnknownNameError(f"unknown executor {name!r}{nearest(name, known) or '; known: ' + ', '.join(known)}")
    if address is not None and name != "ray":
        raise ValueError(f"address: expected executor='ray' beside it, got {name!r}")
    if name in ("pool", "ray") and workers < 1:
        raise ValueError(f"workers: expected at least 1 for the executor {name!r}, got {workers}")
    if name == "here" or (name is None and workers == 0):
        return Here()
    if name == "ray":
        return RayExecutor(workers if address is not None else min(workers, available_cores()), address)
    return Pool(min(workers, available_cores()))
