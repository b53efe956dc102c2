"""An executor: Ray, on this machine or on a cluster. The calling process alone reads and writes the ledger."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from attnlab.compare.cells import Cell
from attnlab.compare.executor import POLL_SECONDS, Advance, Executor, Job, Outcome, attempt
from attnlab.compare.ledger import Claim, Heartbeat, Row
from attnlab.compare.work import needs
from attnlab.core.optional import optional

STORE_BYTES = 256 * 2**20
"""Shared memory of an instance that is started here, through which trained parameters go; by itself Ray takes a third of all."""


class RayExecutor(Executor):
    """Every cell is a Ray task of one core; a cell whose process dies is tried again, as often as the ledger allows.

    Where Ray runs already in this process it is used as it is; otherwise it is started, or connected to, and left afterwards.

    Args:
        workers: cells in work at a time, and cores of an instance that is started here.
        address: of a running cluster, as `ray.init` takes it ("auto", "10.0.0.1:6379", "ray://..."), whose nodes have the
            same attnlab installed; None starts an instance on this machine.

    Raises:
        MissingPackageError: Ray is not installed.
        ValueError: from `work`: nothing answers at the address.
    """

    name = "ray"

    def __init__(self, workers: int, address: str | None = None) -> None:
        self._ray: Any = optional("ray", "ray", "the Ray executor")
        self.workers, self.address = workers, address

    @contextmanager
    def begin(self, job: Job) -> Iterator[Advance]:
        """Each step submits what is free and collects what is done."""
        with Heartbeat(job.ledger.path), self._connection():
            tasks = _Tasks(self._ray, job, self.workers)
            try:
                yield tasks.advance
            finally:
                tasks.give_back()

    @contextmanager
    def _connection(self) -> Iterator[None]:
        if self._ray.is_initialized():
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is None:
            quiet |= {"num_cpus": self.workers, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        try:
            self._ray.init(address=self.address or "local", **quiet)
        except ConnectionError as error:
            raise ValueError(f"address: expected that of a running Ray cluster, got {self.address!r}: {error}") from error
        try:
            yield
        finally:
            self._ray.shutdown()


class _Tasks:
    """The cells of a job that Ray has."""

    def __init__(self, ray: Any, job: Job, limit: int) -> None:
        self._ray, self._job, self._limit = ray, job, limit
        # Ray's own retries would hide from the ledger that a process died.
        self._remote = ray.remote(num_cpus=1, max_retries=0)(work)
        self._claims: dict[Any, Claim] = {}

    def advance(self, rows: Sequence[Row]) -> None:
        """Submit what there is room for, and settle what has ended."""
        while len(self._claims) < self._limit and (claim := self._job.claim()) is not None:
            keys = needs(claim.cell)
            self._claims[self._remote.remote(claim.cell, keys, *map(self._job.ledger.weights, keys))] = claim
        if not self._claims:
            time.sleep(POLL_SECONDS)
            return
        ended, _ = self._ray.wait(list(self._claims), timeout=POLL_SECONDS)
        for task in ended:
            self._collect(task)

    def _collect(self, task: Any) -> None:
        claim, errors = self._claims[task], self._ray.exceptions
        try:
            self._job.settle(claim, self._ray.get(task))
        except errors.RayTaskError as error:  # not the cell itself, whose errors are outcomes: its process cannot import attnlab
            self._job.ledger.fail(self._job.run, claim, str(error))
        except errors.RayError as error:
            self._job.ledger.crashed(self._job.run, claim, type(error).__name__)
        del self._claims[task]

    def give_back(self) -> None:
        """Stop what is still in work."""
        for task, claim in self._claims.items():
            self._job.ledger.release(self._job.run, claim)
            self._ray.cancel(task, force=True)


def work(cell: Cell, keys: Sequence[str], *weights: bytes) -> Outcome:
    """What a task does: a cell, in one thread, with the parameters that the training cells called ``keys`` ended with."""
    torch.set_num_threads(1)
    return attempt(cell, dict(zip(keys, weights, strict=True)).__getitem__, lambda: None)
