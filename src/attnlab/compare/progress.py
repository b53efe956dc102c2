"""How far a run is, and how long it will still take."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from attnlab.compare.cells import Role
from attnlab.compare.ledger import Row

# Seconds a cell of each role where none has finished yet; replaced by what is measured as soon as there is something.
GUESS: Mapping[Role, float] = {
    "sweep": 6.0,
    "seed": 6.0,
    "test": 0.3,
    "matrix": 0.2,
    "control": 8.0,
    "rounding": 0.5,
    "timing": 6.0,
}


class Silent:
    """No display."""

    def working(self, label: str) -> None:
        """Nothing."""

    def update(self, rows: Sequence[Row]) -> None:
        """Nothing."""


class Display:
    """A progress bar with the time left; on something that is no terminal, a line a finished cell.

    Args:
        console: where to.
        expected: cells of each role.
        workers: processes at work on everything but timing.
    """

    def __init__(self, console: Console, expected: Mapping[Role, int], workers: int = 1) -> None:
        self._console, self._expected, self._workers = console, expected, max(1, workers)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[left]}"), console=console, transient=True)
        self._bar = self._progress.add_task("preparing", total=sum(expected.values()), left="")
        self._seen: set[tuple[str, Role]] | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def working(self, label: str) -> None:
        """Show what is in work."""
        self._progress.update(self._bar, description=label)

    def update(self, rows: Sequence[Row]) -> None:
        """Show how far the run is."""
        settled = [row for row in rows if row.status in ("finished", "failed")]
        left = time_left(rows, self._expected, self._workers)
        at_work = [row.member.cell.label for row in rows if row.status == "claimed"]
        if at_work:
            self._progress.update(self._bar, description=at_work[0] + (f" and {len(at_work) - 1} more" if at_work[1:] else ""))
        self._progress.update(self._bar, completed=len(settled), left=f"about {duration(left)} left")
        keys = {(row.key, row.member.role) for row in settled}
        if not self._console.is_terminal:
            self._print_new(settled, keys, left)
        self._seen = keys

    def _print_new(self, settled: Sequence[Row], keys: set[tuple[str, Role]], left: float) -> None:
        total = sum(self._expected.values())
        if self._seen is None:
            if keys:
                self._console.print(f"{len(keys)} of {total} cells were finished before")
            return
        new = [row for row in settled if (row.key, row.member.role) not in self._seen]
        for number, row in enumerate(new, len(keys) - len(new) + 1):
            took = "failed" if row.seconds is None else f"{row.seconds:.1f} s"
            line = f"[{number}/{total}] {row.member.cell.label}: {took}, about {duration(left)} left"
            self._console.print(line, markup=False, soft_wrap=True)


def time_left(rows: Sequence[Row], expected: Mapping[Role, int], workers: int) -> float:
    """Seconds until the end: what is left of each role at the mean time of those that have finished."""
    seconds: defaultdict[Role, list[float]] = defaultdict(list)
    done: Counter[Role] = Counter()
    for row in rows:
        if row.status in ("finished", "failed"):
            done[row.member.role] += 1
        if row.seconds is not None:
            seconds[row.member.role].append(row.seconds)
    left = 0.0
    for role, count in expected.items():
        like = seconds.get(role) or (seconds.get("sweep") if role == "seed" else None)
        each = sum(like) / len(like) if like else GUESS[role]
        left += max(0, count - done[role]) * each / (1 if role == "timing" else workers)
    return left


def duration(seconds: float) -> str:
    """``"40 s"``, ``"5 min"``, ``"2 h 10 min"``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
