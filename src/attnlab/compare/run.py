"""One comparison from suite to report."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from attnlab.compare.executor import TIMING, TRAINING, Watcher, work_here
from attnlab.compare.frame import export
from attnlab.compare.ledger import Ledger, Row
from attnlab.compare.machine import available_cores, machine_facts
from attnlab.compare.plan import Plan, describe
from attnlab.compare.pool import work_in_pool
from attnlab.compare.progress import Display, Silent
from attnlab.compare.report import Citation, write_report
from attnlab.compare.suites import Suite, load_suite, select
from attnlab.compare.summary import Summary, summarise

LEDGER, REPORT = "ledger.sqlite", "report.html"


@dataclass(frozen=True)
class Results:
    """What a comparison gave.

    Args:
        summary: scores, ranks, control, costs.
        rows: every cell with its result.
        folder: where everything lies.
        report: the HTML file.
    """

    summary: Summary
    rows: tuple[Row, ...]
    folder: Path
    report: Path

    @property
    def ok(self) -> bool:
        """Whether everything ran, the control ties and every gate passed."""
        return self.summary.ok


def compare(
    suite: Suite | str | os.PathLike[str] = "quick",
    out: str | os.PathLike[str] | None = None,
    *,
    mixers: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    seeds: int | None = None,
    learning_rates: Sequence[float] | None = None,
    timing: bool = True,
    workers: int | None = None,
    fresh: bool = False,
    console: Console | None = None,
    citations: Mapping[str, Citation] | None = None,
    command: str | None = None,
) -> Results:
    """Train, time and report; what an earlier call has finished in the same folder is not done again.

    Workers and memory measurements are processes that import the calling script, so a script calls this below
    ``if __name__ == "__main__":``, as `multiprocessing` wants it.

    Args:
        suite: a suite, the name of one, or the path of a TOML file.
        out: folder of ledger, report and tables; by default ``runs/<suite's name>``.
        mixers: labels of the suite's mixers, or names of registered ones, in place of the suite's.
        tasks: the same for tasks.
        seeds: runs of each mixer on each task, in place of the suite's.
        learning_rates: rates of the sweep on every task, in place of the suite's.
        timing: False measures no speed and no memory.
        workers: processes that train, one thread each, in place of the suite's; 0 trains in this process with all its threads.
            Timing is always done in this process, alone.
        fresh: set an earlier ledger aside and start anew.
        console: where progress is shown; None shows nothing.
        citations: papers by slug, for the report's links.
        command: what the report says how to make it again; by default this process's own command line.

    Raises:
        UnknownNameError: for a suite, mixer, task or option that does not exist; the nearest are named.
        ValueError: for a number out of range.
        RuntimeError: called while a worker imports the calling script.
        KeyboardInterrupt: stopped; cells in work have been given back, and the same call goes on from there.
    """
    _refuse_in_a_worker()
    chosen = select(
        suite if isinstance(suite, Suite) else load_suite(suite),
        mixers=mixers,
        tasks=tasks,
        seeds=seeds,
        learning_rates=learning_rates,
        timing=timing,
        workers=workers,
    )
    folder = Path(out) if out is not None else Path("runs") / chosen.name
    run = _run(chosen, folder, fresh, console, command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    return make_report(folder / LEDGER, folder, run=run, citations=citations)


def _run(suite: Suite, folder: Path, fresh: bool, console: Console | None, command: str) -> int:
    """Do what is left of the suite; returns the run's number, for another process may have opened a later one meanwhile."""
    machine = machine_facts()
    plan = Plan(suite, machine)  # before an earlier ledger is touched: this is where a wrong suite is refused
    workers = min(suite.workers, available_cores())
    if fresh:
        set_aside(folder / LEDGER)
    with Ledger(folder / LEDGER) as ledger:
        run = ledger.open_run({**describe(plan), "machine": machine, "command": command, "workers": workers})
        ledger.add(run, plan.ready([]))
        ledger.retry_failed(run)
        _execute(ledger, run, plan, workers, console)
    return run


def _refuse_in_a_worker() -> None:
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError("compare was called while a worker imports the script: call it below `if __name__ == '__main__':`")


def _execute(ledger: Ledger, run: int, plan: Plan, workers: int, console: Console | None) -> None:
    display = nullcontext(Silent()) if console is None else Display(console, plan.expected(), workers)
    threads = torch.get_num_threads()
    try:
        with display as watcher:
            _train(ledger, run, plan, workers, watcher)
            work_here(ledger, run, plan, TIMING, watcher)
    except BaseException:
        ledger.close_run(run, "interrupted")
        raise
    finally:
        torch.set_num_threads(threads)
    ledger.close_run(run, "finished")


def _train(ledger: Ledger, run: int, plan: Plan, workers: int, watcher: Watcher) -> None:
    if workers == 0:
        work_here(ledger, run, plan, TRAINING, watcher)
    else:
        work_in_pool(ledger, run, plan, TRAINING, watcher, workers)


def set_aside(ledger: Path) -> Path | None:
    """Rename a ledger, with what SQLite keeps beside it; returns the new path, or None if there was none."""
    if not ledger.exists():
        return None
    target = ledger.with_name(f"{ledger.stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}{ledger.suffix}")
    for ending in ("", "-wal", "-shm"):
        part = ledger.with_name(ledger.name + ending)
        if part.exists():
            part.rename(target.with_name(target.name + ending))
    return target


def make_report(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    run: int | None = None,
    citations: Mapping[str, Citation] | None = None,
) -> Results:
    """Write the report and the tables from whatever is in a ledger.

    Args:
        source: a ledger, or the folder of one.
        out: folder to write into; by default the ledger's.
        run: number of the run; by default the last.
        citations: papers by slug, for links.

    Raises:
        FileNotFoundError: there is no ledger.
        ValueError: it holds no such run.
    """
    path = Path(source) / LEDGER if Path(source).is_dir() else Path(source)
    if not path.exists():
        raise FileNotFoundError(f"expected a ledger, or a folder with {LEDGER}, got {os.fspath(source)}")
    with Ledger(path) as ledger:
        runs = {entry["id"]: entry for entry in ledger.runs()}
        number = max(runs, default=0) if run is None else run
        if number not in runs:
            raise ValueError(f"run: expected one of {sorted(runs)}, got {number}; the ledger is {path}")
        rows = ledger.rows(number)
    facts = runs[number]["facts"]
    moments = {key: runs[number][key] for key in ("started", "finished", "state")}
    summary = summarise({**facts, **moments}, rows)
    folder = Path(out) if out is not None else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    export(folder, summary, rows)
    write_report(folder / REPORT, summary, citations=citations or {})
    return Results(summary, tuple(rows), folder, folder / REPORT)
