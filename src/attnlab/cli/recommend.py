"""``attnlab recommend``: which mechanism for what you need, from what this machine has measured."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from attnlab.cli.console import console, plain_table, print_json

if TYPE_CHECKING:
    from attnlab.compare.recommend import Estimate, Recommendation, Suggestion

UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
SIGNS = {"measured": "", "between": "~", "beyond": "≈"}
"""What stands before a number that was not measured at this very length."""
FEW = 12


def recommend(
    length: Annotated[int, typer.Option(help="Tokens that one sequence has.")],
    causal: Annotated[bool, typer.Option("--causal", help="No token may see a later one.")] = False,
    streaming: Annotated[bool, typer.Option("--streaming", help="Piece by piece or token by token, with a state.")] = False,
    cross: Annotated[bool, typer.Option("--cross", help="Reads keys from another sequence.")] = False,
    grid: Annotated[int | None, typer.Option(help="Rank of the grid: 2 for images, 3 for video.", min=1, max=3)] = None,
    memory: Annotated[
        str | None, typer.Option(help="What --layers layers may take: 8GiB, 500MiB. In training; with --streaming, their state.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers that share --memory.", min=1)] = 1,
    task: Annotated[str | None, typer.Option(help="Order by quality on this task of your comparisons first.")] = None,
    work: Annotated[str, typer.Option(help="What time counts: training, forward (prefill) or decode.")] = "training",
    ledgers: Annotated[
        list[Path] | None, typer.Option("--ledger", help="A ledger or a folder of some; again for more [default: runs].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say which mechanisms qualify, in the order of what your own comparisons have measured, and what is not known.

    Every number is of the machine that measured it. One that was not measured at this length is marked: ~ lies between two
    measured lengths, ≈ beyond them, at the growth that was seen.

    Examples: attnlab recommend --length 16384 --causal --streaming --memory 8GiB --task recall; attnlab recommend --length 4096
    --grid 2

    Exit codes: 0 fine, 1 nothing qualifies, 2 bad usage.
    """
    from attnlab.compare.recommend import Need, find_ledgers
    from attnlab.compare.recommend import recommend as answer

    if work not in SIDES:
        raise ValueError(f"--work: expected one of {', '.join(SIDES)}, got {work!r}")
    limit = None if memory is None else read_bytes(memory)
    need = Need(length, causal, streaming, cross, grid, limit, layers, task, work)  # type: ignore[arg-type]
    found = answer(need, find_ledgers(ledgers or [Path("runs")]))
    if as_json:
        print_json(_as_data(found))
    else:
        _print(found)
    if not (found.suggestions or found.unmeasured):
        raise typer.Exit(1)


SIDES = ("training", "forward", "decode")


def read_bytes(text: str) -> int:
    """``"8GiB"``, ``"500 MB"`` or ``"1024"`` in bytes; both kinds of unit are powers of 1024.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None:
        raise ValueError(f"--memory: expected a number with a unit, such as 8GiB or 500MiB, got {text!r}")
    return int(float(match[1]) * 1024 ** UNITS[match[2]])


def _print(found: Recommendation) -> None:
    screen, need = console(), found.need
    if found.suggestions:
        quality = [need.task] if need.task else []
        held = "state" if need.streaming else "memory"
        table = plain_table("", "mechanism", *quality, f"{need.work}, a layer", "of softmax's time", held)
        for place, entry in enumerate(found.suggestions, 1):
            told = [_quality(found, entry)] if quality else []
            table.add_row(str(place), Text(entry.label, style="bold cyan"), *told, *_numbers(entry))
        screen.print(table)
        screen.print(Text("~ between two measured lengths, ≈ beyond them", style="dim"))
    for entry in found.too_large:
        screen.print(f"too large: {entry.label} ({_numbers(entry)[2]} a layer, {need.layers} of them)")
    _print_unknown(found)


def _quality(found: Recommendation, entry: Suggestion) -> str:
    from attnlab.compare.report.words import half_width_text, value_text

    score, task = entry.score, found.task
    if score is None or score.interval is None or task is None:
        return "not measured"
    rank = "" if score.rank is None else f", rank {score.rank.text}"
    return f"{value_text(task, score.interval.mean)} {half_width_text(task, score.interval)}{rank}"


def _numbers(entry: Suggestion) -> tuple[str, str, str]:
    from attnlab.compare.report.words import bytes_text, seconds_text

    def told(value: Estimate | None, text: Any) -> str:
        return "not measured" if value is None else SIGNS[value.known] + text(value.value)

    return told(entry.seconds, seconds_text), told(entry.ratio, lambda x: f"{x:.2f}"), told(entry.memory, bytes_text)


def _print_unknown(found: Recommendation) -> None:
    """What qualifies without numbers, and where the numbers are from."""
    screen, names = console(), found.unmeasured
    if names:
        shown = ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")
        screen.print(f"\nqualify, not measured here: {shown}")
        task = f" --tasks {found.need.task}" if found.need.task else ""
        screen.print(
            f"to measure some: attnlab compare --mixers softmax,{','.join(names[:2])}{task} --out runs/more", soft_wrap=True
        )
    elif not found.suggestions:
        screen.print("No registered mechanism qualifies; `attnlab list` shows what each supports.")
    for source, machine in found.machines.items():
        screen.print(Text(f"measured: {source}, on {machine}", style="dim"))


def _as_data(found: Recommendation) -> dict[str, Any]:
    keep = asdict(found)
    for entry in (*keep["suggestions"], *keep["too_large"]):
        if entry["score"] is not None:
            entry["score"] = {name: entry["score"][name] for name in ("task", "interval", "rank", "rate", "seeds")}
    return keep
