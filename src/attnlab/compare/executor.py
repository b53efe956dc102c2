"""Working through a run's cells in this process; `attnlab.compare.pool` does it in several."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from attnlab.compare.ledger import Claim, Heartbeat, Ledger, Row
from attnlab.compare.plan import Plan
from attnlab.compare.work import Interrupted, perform

TRAINING: tuple[str, ...] = ("train", "test", "rounding")
TIMING: tuple[str, ...] = ("timing",)
POLL_SECONDS = 0.2


@runtime_checkable
class Watcher(Protocol):
    """What follows the work: a progress display, or nothing."""

    def working(self, label: str) -> None:
        """A cell has been started."""

    def update(self, rows: Sequence[Row]) -> None:
        """The run's cells stand as ``rows`` say."""


def work_here(ledger: Ledger, run: int, plan: Plan, kinds: Sequence[str], watcher: Watcher) -> None:
    """Do all cells of these kinds in this process, and wait for those that other processes work on.

    Raises:
        KeyboardInterrupt: the cell in work has been given back.
    """
    with Heartbeat(ledger.path):
        while True:
            rows = grow(ledger, run, plan)
            watcher.update(rows)
            claim = ledger.claim(run, kinds)
            if claim is not None:
                watcher.working(claim.cell.label)
                work_on(ledger, run, claim, lambda: None)
            elif settled(rows, kinds):
                return
            else:
                time.sleep(POLL_SECONDS)


def grow(ledger: Ledger, run: int, plan: Plan) -> list[Row]:
    """Enter the cells that the results so far call for; the members of the run afterwards."""
    rows = ledger.rows(run)
    return ledger.rows(run) if ledger.add(run, plan.ready(rows)) else rows


def settled(rows: Sequence[Row], kinds: Sequence[str]) -> bool:
    """Whether all cells of these kinds have finished or failed."""
    return all(row.status in ("finished", "failed") for row in rows if row.member.cell.kind in kinds)


def work_on(ledger: Ledger, run: int, claim: Claim, check: Callable[[], None]) -> None:
    """Do one claimed cell and settle it: finished, failed with its error, or given back when interrupted."""
    start = time.perf_counter()
    try:
        done = perform(claim.cell, ledger.weights, check)
    except (KeyboardInterrupt, Interrupted):
        ledger.release(run, claim)
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        ledger.fail(run, claim, f"{type(error).__name__}: {error} ({place.name}, {place.filename}:{place.lineno})")
    else:
        ledger.finish(run, claim, done.result, time.perf_counter() - start, done.weights)
