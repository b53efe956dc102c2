"""A pool of local processes that share a run through its ledger, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event

import torch

from attnlab.compare.executor import POLL_SECONDS, Watcher, grow, settled, work_on
from attnlab.compare.ledger import Heartbeat, Ledger
from attnlab.compare.plan import Plan
from attnlab.compare.work import Interrupted

GRACE_SECONDS = 10.0
"""Time that workers get to give their cells back when the run is stopped."""
MAX_DEATHS = 2
"""Deaths a worker, none of which brought a cell to its end, after which the pool gives up."""


def work_in_pool(ledger: Ledger, run: int, plan: Plan, kinds: Sequence[str], watcher: Watcher, workers: int) -> None:
    """Do all cells of these kinds in ``workers`` new processes; one that dies is replaced, and its cell taken over.

    Raises:
        KeyboardInterrupt: the cells in work have been given back.
        RuntimeError: workers die and nothing gets done.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # idle OpenMP threads that spin take the cores from the other workers
    context = multiprocessing.get_context("spawn")
    stop = context.Event()

    def start() -> SpawnProcess:
        process = context.Process(target=worker, args=(str(ledger.path), run, tuple(kinds), stop), daemon=True)
        process.start()
        return process

    pool = [start() for _ in range(workers)]
    deaths, done = 0, -1
    try:
        while True:
            rows = grow(ledger, run, plan)
            watcher.update(rows)
            if settled(rows, kinds):
                return
            before, done = done, sum(row.status in ("finished", "failed") for row in rows)
            deaths = 0 if done > before else deaths + sum(not process.is_alive() for process in pool)
            if deaths > MAX_DEATHS * workers:
                raise RuntimeError(
                    f"{deaths} worker processes died in a row without finishing a cell. "
                    "Try workers=0; a script that calls compare must do so below `if __name__ == '__main__':`"
                )
            pool = [process if process.is_alive() else start() for process in pool]
            time.sleep(2 * POLL_SECONDS)  # reading the ledger costs the workers time
    finally:
        stop.set()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in pool:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def worker(path: str, run: int, kinds: Sequence[str], stop: Event) -> None:
    """What a process of the pool does: claim, work, settle, until it is told to stop or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which then sets `stop`
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def check() -> None:
        if stop.is_set() or (parent is not None and not parent.is_alive()):
            raise Interrupted

    with Ledger(path) as ledger, Heartbeat(path):
        while not stop.is_set() and (parent is None or parent.is_alive()):
            claim = ledger.claim(run, kinds)
            if claim is None:
                stop.wait(POLL_SECONDS)
                continue
            try:
                work_on(ledger, run, claim, check)
            except Interrupted:
                return
