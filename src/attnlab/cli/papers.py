"""`attnlab papers`: what of each paper is implemented, what is proven, what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.text import Text

from attnlab.cli.console import ROOMY, console, plain_table, print_json
from attnlab.cli.describe import paper_data
from attnlab.papers.catalog import citation, paper
from attnlab.papers.coverage import CoverageRow, coverage
from attnlab.papers.evidence import TIERS


def papers_command(
    slug: Annotated[str | None, typer.Argument(help="A paper's short name or number; all papers without it.")] = None,
    implemented: Annotated[
        bool | None,
        typer.Option("--implemented/--missing", help="Only papers that something here implements, or that nothing does."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the papers: what implements each, which proof tiers hold, what is missing.

    Example: attnlab papers --implemented
    """
    rows = coverage()
    if slug is not None:
        chosen = rows[paper(int(slug) if slug.isdecimal() else slug).index]
        print_json(row_data(chosen)) if as_json else _print_one(chosen)
        return
    shown = [row for row in rows if implemented is None or row.implemented == implemented]
    if as_json:
        print_json({"counts": counts(rows), "papers": [row_data(row) for row in shown]})
        return
    _print_table(shown)
    console().print(Text(count_line(rows), style="bold"))


def counts(rows: Sequence[CoverageRow]) -> dict[str, int]:
    """How many papers there are, are implemented, are so in part, are proven in all tiers that apply, and are missing."""
    implemented = sum(row.implemented for row in rows)
    return {
        "papers": len(rows),
        "implemented": implemented,
        "in_part": sum(row.in_part for row in rows),
        "proven": sum(row.proven for row in rows),
        "missing": len(rows) - implemented,
    }


def count_line(rows: Sequence[CoverageRow]) -> str:
    """The counts as a sentence."""
    n = counts(rows)
    built = f"{n['implemented']} implemented ({n['in_part']} of them in part), {n['proven']} proven in every tier that applies"
    return f"{n['papers']} papers: {built}; {n['missing']} missing"


def row_data(row: CoverageRow) -> dict[str, Any]:
    """A row as plain data."""
    return paper_data(row.paper) | {
        "implemented": row.implemented,
        "in_part": row.in_part,
        "proven": row.proven,
        "things": list(row.things),
        "tiers": {thing: list(tiers) for thing, tiers in row.tiers.items()},
        "missing": {thing: list(tiers) for thing, tiers in row.missing.items()},
    }


def _print_table(rows: Sequence[CoverageRow]) -> None:
    out = console()
    roomy = out.width >= ROOMY
    table = plain_table("#", "paper", "year", "implemented by", "holds", "missing", *(["title"] if roomy else []))
    table.columns[0].justify = "right"
    table.columns[1].style = "cyan"
    for row in rows:
        held = sorted({tier for tiers in row.tiers.values() for tier in tiers})
        missing = sorted({tier for tiers in row.missing.values() for tier in tiers})
        cells = [
            str(row.paper.index),
            row.paper.slug,
            str(row.paper.year),
            ", ".join(row.things),
            " ".join(held),
            " ".join(missing),
        ]
        table.add_row(*(Text(cell) for cell in (*cells, *([row.paper.title] if roomy else []))))
    out.print(table)


def _print_one(row: CoverageRow) -> None:
    out = console()
    subject = row.paper
    out.print(Text.assemble((subject.slug, "bold cyan"), f"  {subject.kind}, {subject.family}  (number {subject.index})"))
    out.print(Text(citation(subject).rstrip()), soft_wrap=True)
    if subject.reconstruction:
        out.print(Text("Could not be read in full: what is built is a reconstruction, and no equivalence is claimed."))
    for thing in row.things:
        out.print()
        out.print(Text.assemble((thing, "bold"), "  a part of what the paper has" if thing in row.partial else ""))
        for tier in row.tiers[thing]:
            out.print(Text(f"  {tier} {TIERS[tier]}"))
        for tier in row.missing[thing]:
            out.print(Text(f"  {tier} missing ({TIERS[tier]})", style="dim"))
    if not row.implemented:
        out.print(Text("Nothing here implements it yet.", style="dim"))
