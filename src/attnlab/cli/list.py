"""`attnlab list`: what is registered, and what it supports."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.text import Text

from attnlab.cli.console import ROOMY, console, plain_table, print_json
from attnlab.cli.describe import cost_text, headline, listing_data, registry
from attnlab.core.info import Info, MixerInfo
from attnlab.core.registry import Entry


def list_command(
    pattern: Annotated[str, typer.Argument(help="A shell pattern on the name, or a part of it.")] = "*",
    kind: Annotated[
        str, typer.Option(help="mixer, position, modifier, channel_mixer, reducer, model, objective or task.")
    ] = "mixer",
    family: Annotated[str | None, typer.Option(help="The room: linear, local, dense, ...")] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--no-causal", help="Can be causal, or cannot.")] = None,
    streaming: Annotated[bool | None, typer.Option("--streaming/--no-streaming", help="Runs piece by piece, or not.")] = None,
    grid: Annotated[int | None, typer.Option(help="Takes a grid of this rank: 1, 2 or 3.", min=1)] = None,
    cross: Annotated[bool | None, typer.Option("--cross/--no-cross", help="Reads keys from another sequence, or not.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what is registered: names, promises, cost.

    Example: attnlab list --causal --streaming
    """
    wanted: dict[str, object] = {"causal": causal, "streaming": streaming, "grid": grid, "cross": cross}
    filters = {name: value for name, value in wanted.items() if value is not None}
    if filters and kind != "mixer":
        raise ValueError(f"--{next(iter(filters))} is a promise of mixers: expected --kind mixer with it, got --kind {kind}")
    found = select(pattern, kind, family, filters)
    if as_json:
        print_json([listing_data(entry) for entry in found])
    elif not found:
        print(f"No {kind} matches; `attnlab list --kind {kind}` shows all.", file=sys.stderr)
    else:
        _print(found, kind)


def select(pattern: str, kind: str, family: str | None, filters: dict[str, object]) -> list[Entry[Any]]:
    """The entries of a kind that match; a pattern without ``*``, ``?`` or ``[`` may stand anywhere in the name."""
    known = registry(kind)
    if not set(pattern) & set("*?["):
        pattern = f"*{pattern}*"
    return [known.get(name) for name in known.names(pattern, family=family, **filters)]


def _print(found: Sequence[Entry[Any]], kind: str) -> None:
    if kind == "mixer":
        columns = ["name", "family", "causal", "streaming", "grid", "cross", "cost"]
        rows = [[entry.name, entry.info.family, *_promises(entry.info)] for entry in found]
    else:
        columns = ["name", "family", "paper"]
        rows = [[entry.name, entry.info.family, entry.info.paper or ""] for entry in found]
    out = console()
    if out.width >= ROOMY:
        columns.append("summary")
        rows = [[*row, headline(entry)] for row, entry in zip(rows, found, strict=True)]
    table = plain_table(*columns)
    table.columns[0].style = "bold cyan"
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)
    kinds = kind.replace("_", " ") + "s" * (len(found) != 1)
    out.print(Text(f"{len(found)} {kinds}; `attnlab info NAME` tells more", style="dim"))
    for module, error in registry(kind).broken.items():
        print(f"{module} could not be imported: {error}", file=sys.stderr)


def _promises(info: Info) -> tuple[str, ...]:
    if not isinstance(info, MixerInfo):
        return ("",) * 5
    supports = info.supports
    streaming = f"yes, {supports.state}" if supports.streaming else "no"
    ranks = ", ".join(str(rank) for rank in sorted(supports.grid))
    return (supports.causal, streaming, ranks, "yes" if supports.cross else "no", cost_text(supports.cost))
