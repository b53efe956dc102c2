"""An executor: local processes that share a run through its ledger, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event

import torch

from attnlab.compare.executor import POLL_SECONDS, Advance, Executor, Job
from attnlab.compare.ledger import Heartbeat, Ledger, Row
from attnlab.compare.progress import Silent
from attnlab.compare.work import Interrupted

GRACE_SECONDS = 10.0
"""Time that workers get to give their cells back when the run is stopped."""
MAX_DEATHS = 2
"""Deaths a worker, none of which brought a cell to its end, after which the pool gives up."""


class Pool(Executor):
    """New processes on this machine; one that dies is replaced, and its cell taken over.

    Args:
        workers: how many.

    Raises:
        RuntimeError: from `work`: workers die and nothing gets done.
    """

    name = "pool"

    def __init__(self, workers: int) -> None:
        self.workers = workers

    @contextmanager
    def begin(self, job: Job) -> Iterator[Advance]:
        """Each step looks after the processes, which claim their cells themselves."""
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # idle OpenMP threads that spin take the cores from other workers
        processes = _Processes(job, self.workers)
        try:
            yield processes.look_after
        finally:
            processes.stop()


class _Processes:
    """The processes of a pool."""

    def __init__(self, job: Job, count: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._stop = self._context.Event()
        self._arguments = (str(job.ledger.path), job.run, job.kinds, self._stop)
        self._deaths, self._done = 0, -1
        self._pool = [self._start() for _ in range(count)]

    def _start(self) -> SpawnProcess:
        process = self._context.Process(target=worker, args=self._arguments, daemon=True)
        process.start()
        return process

    def look_after(self, rows: Sequence[Row]) -> None:
        """Replace those that have died, unless they die of something that is wrong with all of them; then wait a little."""
        before, self._done = self._done, sum(row.status in ("finished", "failed") for row in rows)
        dead = sum(not process.is_alive() for process in self._pool)
        self._deaths = 0 if self._done > before else self._deaths + dead
        if self._deaths > MAX_DEATHS * len(self._pool):
            raise RuntimeError(
                f"{self._deaths} worker processes died in a row without finishing a cell. "
                "Try workers=0; a script that calls compare must do so below `if __name__ == '__main__':`"
            )
        self._pool = [process if process.is_alive() else self._start() for process in self._pool]
        time.sleep(2 * POLL_SECONDS)  # reading the ledger costs the workers time

    def stop(self) -> None:
        """Let all give their cells back and end; kill what takes too long."""
        self._stop.set()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self._pool:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def worker(path: str, run: int, kinds: tuple[str, ...], stop: Event) -> None:
    """What a process of the pool does: claim, work, settle, until it is told to stop or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which then sets `stop`
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def check() -> None:
        if stop.is_set() or (parent is not None and not parent.is_alive()):
            raise Interrupted

    with Ledger(path) as ledger, Heartbeat(path):
        job = Job(ledger, run, kinds, Silent())
        while not stop.is_set() and (parent is None or parent.is_alive()):
            claim = job.claim()
            if claim is None:
                stop.wait(POLL_SECONDS)
                continue
            try:
                job.do(claim, check)
            except Interrupted:
                return
