"""``attnlab claims``: what papers say that can be measured here, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from attnlab.claims import Claim, Outcome, claim, claims, outcomes, run_claims
from attnlab.claims.outcomes import is_stale, settled, thresholds
from attnlab.cli.console import console, plain_table, print_json
from attnlab.core.errors import UnknownNameError, nearest
from attnlab.papers.catalog import citation, paper

ACTIONS = ("list", "show", "run")
NOT_YET = "not yet measured"


def claims_command(
    action: Annotated[str, typer.Argument(help="list, show or run.")] = "list",
    ids: Annotated[list[str] | None, typer.Argument(help="Claims; all of them without any.", show_default=False)] = None,
    cells: Annotated[str, typer.Option(help="run: folder of finished work.")] = "runs/claims",
    out: Annotated[
        str | None, typer.Option(help="run: file of the outcomes [default: the package's own].", show_default=False)
    ] = None,
    threads: Annotated[int, typer.Option(help="run: threads of torch.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show and measure the claims ledger: published statements, the numbers measured here, and what became of them.

    A verdict (reproduced, partly, not, not testable here) is what a claim's thresholds say of the numbers measured; nobody writes
    it by hand. What is finished is kept at once: the same `run` goes on where it was stopped.

    Examples: `attnlab claims`, `attnlab claims show recall-mamba`, `attnlab claims run recall-softmax recall-linear`

    Exit codes: 0 fine, 2 bad usage, 130 stopped.
    """
    if action not in ACTIONS:
        hint = nearest(action, ACTIONS) or f"; actions: {', '.join(ACTIONS)}"
        hint = f"; did you mean 'attnlab claims show {action}'?" if action in claims() else hint
        raise UnknownNameError(f"unknown action {action!r}{hint}")
    chosen = [claim(name) for name in ids] if ids else list(claims().values())
    if action == "run":
        measured = {outcome.claim: outcome for outcome in _run([c.id for c in chosen], cells, out, threads)}
    else:
        measured = outcomes()
    if as_json:
        print_json([claim_data(c, measured.get(c.id)) for c in chosen])
    elif action == "show":
        for number, subject in enumerate(chosen):
            _print_one(subject, measured.get(subject.id), first=number == 0)
    else:
        _print_table(chosen, measured)


def _run(ids: Sequence[str], cells: str, out: str | None, threads: int) -> list[Outcome]:
    errors = Console(stderr=True, highlight=False)

    def say(line: str) -> None:
        errors.print(line, markup=False, soft_wrap=True)

    try:
        return run_claims(ids, cells=cells, outcomes=out, threads=threads, say=say)
    except KeyboardInterrupt:
        errors.print("Stopped. What was finished is kept; the same command goes on from there.")
        raise typer.Exit(130) from None


def state(subject: Claim, outcome: Outcome | None) -> str:
    """The verdict in words; a claim whose settings or thresholds have changed since counts as not yet measured."""
    if outcome is None:
        return "not testable here" if subject.not_testable else NOT_YET
    return f"{NOT_YET} as it stands now" if is_stale(subject, outcome) else outcome.outcome


def measured_text(subject: Claim, outcome: Outcome | None) -> str:
    """The number that stands for the claim, with its interval."""
    if outcome is None or subject.number not in outcome.quantities:
        return ""
    return f"{subject.number} {outcome.quantities[subject.number].text}"


def claim_data(subject: Claim, outcome: Outcome | None) -> dict[str, Any]:
    """A claim with its outcome as plain data."""
    source = paper(subject.paper)
    return {
        "id": subject.id,
        "paper": {"slug": source.slug, "title": source.title, "year": source.year, "arxiv": source.arxiv},
        "statement": subject.statement,
        "published": subject.published,
        "how": subject.how,
        "budget": subject.budget,
        "number": subject.number,
        "settings": settled(subject),
        "thresholds": thresholds(subject),
        "not_testable": subject.not_testable,
        "pending": subject.pending if outcome is None else "",
        "outcome": state(subject, outcome),
        "measured": None if outcome is None else outcome.record(),
    }


def _print_table(chosen: Sequence[Claim], measured: dict[str, Outcome]) -> None:
    out = console()
    table = plain_table("claim", "paper", "outcome", "measured", "published", "statement")
    table.columns[0].style = "cyan"
    for subject in chosen:
        found = measured.get(subject.id)
        cells = (
            subject.id,
            subject.paper,
            state(subject, found),
            measured_text(subject, found),
            subject.published,
            subject.statement,
        )
        table.add_row(*map(Text, cells))
    for column in table.columns[4:]:
        column.no_wrap = False
    out.print(table)
    states = [state(subject, measured.get(subject.id)) for subject in chosen]
    counts = ", ".join(f"{states.count(name)} {name}" for name in dict.fromkeys(states))
    out.print(Text(f"{len(chosen)} claims: {counts}", style="bold"))


def _print_one(subject: Claim, outcome: Outcome | None, *, first: bool) -> None:
    out = console()
    if not first:
        out.print()
    source = paper(subject.paper)
    out.print(Text.assemble((subject.id, "bold cyan"), f"  {source.title} ({source.year})"))
    rows = [("says", subject.statement), ("published", subject.published), ("measured by", subject.how)]
    rows += [("budget", subject.budget), ("not testable", subject.not_testable)]
    rows += [("reproduced if", "; ".join(condition.text for condition in subject.reproduced))]
    rows += [("partly if", "; ".join(condition.text for condition in subject.partly))]
    rows += [("outcome", state(subject, outcome))]
    rows += [("pending", subject.pending if outcome is None else "")]
    if outcome is not None:
        rows += [("", f"{name} {quantity.text}") for name, quantity in outcome.quantities.items()]
        machine = outcome.machine
        rows += [("on", f"{outcome.date}, {machine.get('cpu')}, {outcome.seconds:g} s, attnlab {outcome.version}")]
    for name, text in rows:
        if text:
            out.print(Text.assemble((f"  {name:<14}", "dim"), text), soft_wrap=True)
    out.print(Text(citation(source).rstrip(), style="dim"), soft_wrap=True)
