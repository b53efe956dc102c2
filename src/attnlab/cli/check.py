"""``attnlab check``: the conformance suite on registered mixers, or on a class in a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from attnlab.checking.records import Report
from attnlab.cli.console import console, print_json
from attnlab.core.catalog import mixers
from attnlab.core.errors import UnknownNameError
from attnlab.core.plugins import load_object

Target = str | Callable[..., Any]


def check(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Registered names (attnlab list), or path.py:Class.", show_default=False)
    ] = None,
    all_mixers: Annotated[bool, typer.Option("--all", help="Every registered mixer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    profile: Annotated[str, typer.Option(help="How much is drawn: default or thorough.")] = "default",
    only: Annotated[list[str] | None, typer.Option(help="A check by name or shell pattern; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Prove mixers against the laws of the contract: padding, causality, streaming, precision, refusals and the rest.

    Examples: attnlab check softmax delta_net; attnlab check my_mixer.py:MyMixer --only 'padding_*'; attnlab check --all --json

    Exit code 0: all passed; 1: a check failed or a mixer could not be imported; 2: bad usage.
    """
    from attnlab import checking

    chosen = _resolve(targets or [], all_mixers)
    broken = {module: str(error) for module, error in mixers.broken.items()} if all_mixers else {}
    reports: dict[str, Report] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("checking", total=len(chosen))
        for name, target in chosen.items():
            progress.update(task, description=name)
            try:
                reports[name] = checking.check(target, profile=profile, seed=seed, only=only)
            except (UnknownNameError, TypeError) as error:
                raise typer.BadParameter(str(error)) from error
            progress.advance(task)
    if as_json:
        print_json(_as_data(reports, broken))
    else:
        _print_tables(reports, broken)
    if broken or not all(report.passed for report in reports.values()):
        raise typer.Exit(1)


def _resolve(targets: list[str], all_mixers: bool) -> dict[str, Target]:
    """What to check, by the name under which it is reported."""
    if bool(targets) == all_mixers:
        raise typer.BadParameter("name mixers to check, or give --all; see attnlab check --help")
    names = mixers.names() if all_mixers else targets
    try:
        return {name: load_object(name) if ":" in name else mixers.get(name).name for name in names}
    except (UnknownNameError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


def _as_data(reports: dict[str, Report], broken: dict[str, str]) -> dict[str, Any]:
    failed = [name for name, report in reports.items() if not report.passed]
    summary = {
        "passed": not failed and not broken,
        "mixers": len(reports),
        "checks": sum(report.checks_run for report in reports.values()),
        "failed": failed,
        "broken": broken,
        "seconds": sum(report.seconds for report in reports.values()),
    }
    return {"mixers": {name: report.to_dict() for name, report in reports.items()}, "summary": summary}


def _print_tables(reports: dict[str, Report], broken: dict[str, str]) -> None:
    """One mixer: every check. Several: a line each, and the failures."""
    screen = console()
    if len(reports) == 1:
        screen.print(*reports.values())
    else:
        for report in reports.values():
            screen.print(str(report), style="" if report.passed else "red", markup=False)
    for module, error in broken.items():
        screen.print(f"{module} could not be imported: {error}", style="red", markup=False)
