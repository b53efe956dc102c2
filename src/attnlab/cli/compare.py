"""``attnlab compare``: train, time, and report."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from attnlab.cli.console import console, plain_table, print_json


def compare(
    suite: Annotated[str, typer.Option(help="A suite of the package: quick, recall, ..., or a TOML file.")] = "quick",
    mixers: Annotated[
        str | None, typer.Option(help="In place of the suite's: softmax,my.py:Mine,...", show_default=False)
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="In place of the suite's: recall,digits,...", show_default=False)] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each mixer on each task.", show_default=False)] = None,
    lrs: Annotated[str | None, typer.Option(help="Learning rates of the sweep: 0.001,0.003", show_default=False)] = None,
    match: Annotated[
        str | None,
        typer.Option(help="What models have as much of: parameters, or compute [default: parameters].", show_default=False),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder of ledger and report [default: runs/SUITE].", show_default=False)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Training processes [default: the suite's]; 0: this process.", show_default=False)
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(help="Who trains: here, pool or ray [default: pool, or here with 0 workers].", show_default=False),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster's; without it Ray is started here.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Set an earlier ledger aside instead of going on with it.")] = False,
    no_timing: Annotated[bool, typer.Option("--no-timing", help="Measure neither speed nor memory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Compare mixers on tasks at a matched parameter budget, and write one report that opens in any browser.

    What is finished is kept at once: the same command goes on where it was stopped, and nothing is run twice.

    Examples: attnlab compare; attnlab compare --mixers softmax,delta_net,mamba --tasks recall --seeds 3 --out runs/recall;
    attnlab compare --executor ray --workers 8

    Exit code 0: all fine; 1: a run failed, the control does not tie or a mixer is not correct; 2: bad usage; 130: stopped.
    """
    own = {"tasks": names(tasks), "seeds": seeds, "match": match, "workers": workers, "executor": executor, "address": address}
    rates = None if lrs is None else numbers("--lrs", lrs)
    results = _run(suite, out, mixers=names(mixers), learning_rates=rates, timing=not no_timing, fresh=fresh, **own)
    show(results, as_json)
    if not results.ok:
        raise typer.Exit(1)


def _run(*arguments: Any, **options: Any) -> Any:
    """Compare, with progress on standard error; when stopped say that nothing is lost."""
    from attnlab.cli.citations import citations
    from attnlab.compare import compare as run

    errors = Console(stderr=True, highlight=False)
    try:
        return run(*arguments, **options, console=errors, citations=citations())
    except KeyboardInterrupt:
        errors.print("Stopped. What was finished is kept; the same command goes on from there.")
        raise typer.Exit(130) from None


def names(text: str | None) -> list[str] | None:
    """The parts of ``a,b,c``; None stays None."""
    if text is None:
        return None
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise typer.BadParameter(f"expected names with commas between them, got {text!r}")
    return found


def numbers(option: str, text: str) -> list[float]:
    """The numbers of ``0.1,0.2``."""
    try:
        return [float(part) for part in names(text) or []]
    except ValueError:
        raise typer.BadParameter(f"{option}: expected numbers with commas between them, got {text!r}") from None


def show(results: Any, as_json: bool) -> None:
    """Print a comparison's outcome: a table and where the report lies, or one JSON object."""
    from attnlab.compare.frame import summary_record
    from attnlab.compare.report.words import half_width_text, headlines, value_text

    summary = results.summary
    if as_json:
        print_json({**summary_record(summary), "report": str(results.report), "folder": str(results.folder)})
        return
    screen = console()
    table = plain_table("mixer", *summary.tasks)
    for name in summary.mixers:
        row = []
        for label, task in summary.tasks.items():
            score = summary.score(label, name)
            rank = "" if score.rank is None else f"  rank {score.rank.text}"
            value = score.state if score.interval is None else value_text(task, score.interval.mean)
            row.append(f"{value} {half_width_text(task, score.interval)}{rank}")
        table.add_row(name, *row)
    screen.print(table)
    for line in headlines(summary):
        screen.print(f"- {line}", markup=False)
    for label, error in summary.failures:
        screen.print(f"failed: {label}: {error}", style="red", markup=False)
    screen.print(f"report: {results.report}", markup=False)
