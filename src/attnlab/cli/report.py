"""``attnlab report``: the report again, from whatever a ledger holds."""

from __future__ import annotations

from typing import Annotated

import typer


def report(
    source: Annotated[str, typer.Argument(help="A ledger, or the folder that `attnlab compare` wrote.")],
    out: Annotated[str | None, typer.Option(help="Folder to write into [default: the ledger's].", show_default=False)] = None,
    run: Annotated[int | None, typer.Option(help="Number of the run [default: the last].", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Write report.html, results.csv, timings.csv and results.json from a ledger, also of a run that is not finished.

    Example: attnlab report runs/quick --out /tmp/report

    Exit code 0: all fine; 1: the run is not complete or a check in it failed; 2: bad usage.
    """
    from attnlab.cli.citations import citations
    from attnlab.cli.compare import show
    from attnlab.compare import make_report

    try:
        results = make_report(source, out, run=run, citations=citations())
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None
    show(results, as_json)
    if not results.ok:
        raise typer.Exit(1)
