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
from typing import Any

import torch
from rich.console import Console

from attnlab.compare.executor import TIMING, TRAINING, Executor, Here
from attnlab.compare.executors import choose_executor
from attnlab.compare.frame import export
from attnlab.compare.ledger import Ledger, Row
from attnlab.compare.machine import machine_facts
from attnlab.compare.plan import Plan, describe
from attnlab.compare.progress import Display, Silent
from attnlab.compare.reading import LEDGER, read_run
from attnlab.compare.report import Citation, write_report
from attnlab.compare.suites import Suite, load_suite, select
from attnlab.compare.summary import Summary

REPORT = "report.html"


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
    match: str | None = None,
    timing: bool = True,
    workers: int | None = None,
    executor: str | None = None,
    address: str | None = None,
    fresh: bool = False,
    console: Console | None = None,
    citations: Mapping[str, Citation] | None = None,
    command: str | None = None,
) -> Results:
    """Train, time and report; what an earlier call has finished in the same folder is not done again.

    A script calls this below ``if __name__ == "__main__":``: workers and memory measurements import it.

    Args:
        suite: a suite, the name of one, or the path of a TOML file.
        out: folder of ledger, report and tables; by default ``runs/<suite's name>``.
        mixers: labels of the suite's mixers, or names of registered ones, in place of the suite's; as are the next ones.
        tasks: the same for tasks.
        seeds: runs of each mixer on each task.
        learning_rates: rates of the sweep on every task.
        match: what models have as much of, "parameters" or "compute"; by default as the suite says.
        timing: False measures no speed and no memory.
        workers: processes that train, one thread each, in place of the suite's; 0: this process. It alone times.
        executor: who trains, "here", "pool" or "ray"; by default a pool of the workers, or here where there are 0.
        address: of a Ray cluster; None starts Ray on this machine.
        fresh: set an earlier ledger aside and start anew.
        console: where progress is shown; None shows nothing.
        citations: papers by slug, for the report's links.
        command: what the report says how to make it again; by default this process's own command line.

    Raises:
        UnknownNameError: for a name that does not exist; the nearest are named.
        ValueError: for a number out of range.
        MissingPackageError: Ray was asked for and is not installed.
        RuntimeError: called while a worker imports the calling script.
        KeyboardInterrupt: stopped; the same call goes on from there.
    """
    _refuse_in_a_worker()
    whole = suite if isinstance(suite, Suite) else load_suite(suite)
    own: dict[str, Any] = {"mixers": mixers, "tasks": tasks, "seeds": seeds, "workers": workers}
    chosen = select(whole, learning_rates=learning_rates, match=match, timing=timing, **own)
    folder = Path(out) if out is not None else Path("runs") / chosen.name
    hands = choose_executor(executor, chosen.workers, address)
    command = command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    run = _run(chosen, folder, hands, fresh, console, command)
    return make_report(folder / LEDGER, folder, run=run, citations=citations)


def _run(suite: Suite, folder: Path, executor: Executor, fresh: bool, console: Console | None, command: str) -> int:
    """Do what is left of the suite; returns the run's number, for another process may have opened a later one meanwhile."""
    machine = machine_facts()
    plan = Plan(suite, machine)  # before an earlier ledger is touched: this is where a wrong suite is refused
    if fresh:
        set_aside(folder / LEDGER)
    with Ledger(folder / LEDGER) as ledger:
        means = {"executor": executor.name, "workers": executor.workers}
        run = ledger.open_run({**describe(plan), "machine": machine, "command": command, **means})
        ledger.add(run, plan.ready([]))
        ledger.retry_failed(run)
        _execute(ledger, run, plan, executor, console)
    return run


def _refuse_in_a_worker() -> None:
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError("compare was called while a worker imports the script: call it below `if __name__ == '__main__':`")


def _execute(ledger: Ledger, run: int, plan: Plan, executor: Executor, console: Console | None) -> None:
    display = nullcontext(Silent()) if console is None else Display(console, plan.expected(), executor.workers)
    threads = torch.get_num_threads()
    try:
        with display as watcher:
            executor.work(ledger, run, plan, TRAINING, watcher)
            Here().work(ledger, run, plan, TIMING, watcher)
    except BaseException:
        ledger.close_run(run, "interrupted")
        raise
    finally:
        torch.set_num_threads(threads)
    ledger.close_run(run, "finished")


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
    summary, rows = read_run(source, run)
    given = Path(source)
    folder = Path(out) if out is not None else given if given.is_dir() else given.parent
    folder.mkdir(parents=True, exist_ok=True)
    export(folder, summary, rows)
    write_report(folder / REPORT, summary, citations=citations or {})
    return Results(summary, tuple(rows), folder, folder / REPORT)
