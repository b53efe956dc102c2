"""Working through a run's cells: what all executors share, and the one that works in this process."""

from __future__ import annotations

import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from attnlab.compare.cells import Cell
from attnlab.compare.ledger import Claim, Heartbeat, Ledger, Row
from attnlab.compare.plan import Plan
from attnlab.compare.work import Done, Interrupted, perform

TRAINING: tuple[str, ...] = ("train", "test", "matrix", "rounding")
TIMING: tuple[str, ...] = ("timing",)
POLL_SECONDS = 0.2


@runtime_checkable
class Watcher(Protocol):
    """What follows the work: a progress display, or nothing."""

    def working(self, label: str) -> None:
        """A cell has been started."""

    def update(self, rows: Sequence[Row]) -> None:
        """The run's cells stand as ``rows`` say."""


@dataclass(frozen=True)
class Outcome:
    """What came of a cell: a result, or the error that it raised."""

    seconds: float
    done: Done | None
    error: str = ""


@dataclass(frozen=True)
class Job:
    """The cells of some kinds in one run."""

    ledger: Ledger
    run: int
    kinds: tuple[str, ...]
    watcher: Watcher

    def claim(self) -> Claim | None:
        """The next cell for this process to answer for; None while there is none."""
        return self.ledger.claim(self.run, self.kinds)

    def settle(self, claim: Claim, outcome: Outcome) -> None:
        """Enter a cell as finished, or as failed with its error."""
        if outcome.done is None:
            self.ledger.fail(self.run, claim, outcome.error)
        else:
            self.ledger.finish(self.run, claim, outcome.done.result, outcome.seconds, outcome.done.weights)

    def do(self, claim: Claim, check: Callable[[], None]) -> None:
        """Do a cell in this process and settle it; it is given back when interrupted."""
        try:
            outcome = attempt(claim.cell, self.ledger.weights, check)
        except (KeyboardInterrupt, Interrupted):
            self.ledger.release(self.run, claim)
            raise
        self.settle(claim, outcome)


Advance = Callable[[Sequence[Row]], None]
"""Goes on with a job a little, given its rows as they stand; called until all cells are settled."""


class Executor(ABC):
    """A way to get through the cells of a run; the ledger is the same for all, and so are the results."""

    name: ClassVar[str]
    workers: int
    """Cells that are in work at a time, 0 where that is the calling process with all its threads."""

    @abstractmethod
    def begin(self, job: Job) -> AbstractContextManager[Advance]:
        """Whatever the work needs, while it lasts; cells that are in work at its end are given back."""

    def work(self, ledger: Ledger, run: int, plan: Plan, kinds: Sequence[str], watcher: Watcher) -> None:
        """Do all cells of these kinds, and wait for those that other processes work on.

        Raises:
            KeyboardInterrupt: the cells in work have been given back.
        """
        with self.begin(Job(ledger, run, tuple(kinds), watcher)) as advance:
            while True:
                rows = grow(ledger, run, plan)
                watcher.update(rows)
                if all(row.status in ("finished", "failed") for row in rows if row.member.cell.kind in kinds):
                    return
                advance(rows)


class Here(Executor):
    """One cell after the other in this process."""

    name = "here"
    workers = 0

    @contextmanager
    def begin(self, job: Job) -> Iterator[Advance]:
        """Each step is a cell."""

        def advance(rows: Sequence[Row]) -> None:
            claim = job.claim()
            if claim is None:
                time.sleep(POLL_SECONDS)
                return
            job.watcher.working(claim.cell.label)
            job.do(claim, lambda: None)

        with Heartbeat(job.ledger.path):
            yield advance


def grow(ledger: Ledger, run: int, plan: Plan) -> list[Row]:
    """Enter the cells that the results so far call for; the members of the run afterwards."""
    rows = ledger.rows(run)
    return ledger.rows(run) if ledger.add(run, plan.ready(rows)) else rows


def attempt(cell: Cell, weights: Callable[[str], bytes], check: Callable[[], None]) -> Outcome:
    """Do a cell; what it raises is an outcome too, but for `Interrupted`. See `attnlab.compare.work.perform`."""
    start = time.perf_counter()
    try:
        done = perform(cell, weights, check)
    except Interrupted:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {error} ({place.name}, {place.filename}:{place.lineno})"
        return Outcome(time.perf_counter() - start, None, told)
    return Outcome(time.perf_counter() - start, done)
