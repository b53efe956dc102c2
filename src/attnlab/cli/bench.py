"""``attnlab bench``: times of mixer layers against softmax attention, each behind its correctness gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from attnlab.cli.compare import numbers
from attnlab.cli.console import console, plain_table, print_json

if TYPE_CHECKING:
    from attnlab.compare.costs import LayerCosts

LENGTHS = "256,1024,4096"


def bench(
    mixers: Annotated[list[str] | None, typer.Argument(help="Registered mixers; none means all.", show_default=False)] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, with commas between.")] = LENGTHS,
    causal: Annotated[
        bool | None,
        typer.Option("--causal/--no-causal", help="Which form [default: causal where there is one].", show_default=False),
    ] = None,
    dim: Annotated[int, typer.Option(help="Width of the layer.")] = 256,
    num_heads: Annotated[int, typer.Option(help="Its heads.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time spent a mixer, length and direction, about.")] = 0.5,
    threads: Annotated[int, typer.Option(help="Torch's threads; one is steady on a machine that does other work too.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time mixer layers against softmax attention of the same size, in interleaved pairs, forward and in training.

    No time is shown of a mixer whose outputs or gradients differ from its reference.

    Examples: attnlab bench delta_net mamba; attnlab bench sliding_window --lengths 1024,4096,16384 --dim 512 --json

    Exit code 0: all fine; 1: a mixer is not correct; 2: bad usage.
    """
    from attnlab.compare import MixerChoice, Timing
    from attnlab.compare.measure import bench as measure
    from attnlab.core.catalog import list_mixers

    chosen = tuple(int(length) for length in numbers("--lengths", lengths))
    timing = Timing(chosen, chosen[-1:], dim, num_heads, batch_size, seconds, threads=threads)
    picked = mixers or [name for name in list_mixers() if causal is None or _has_form(name, causal)]
    with Console(stderr=True, highlight=False).status("measuring") as status:
        found = measure(
            [MixerChoice(name) for name in picked],
            timing,
            causal=causal,
            started=lambda label: status.update(f"measuring {label}"),
        )
    if as_json:
        print_json({"timing": asdict(timing), "mixers": [_as_data(cost) for cost in found]})
    else:
        _print_tables(found, chosen)
    if not all(cost.passed for cost in found):
        raise typer.Exit(1)


def _has_form(name: str, causal: bool) -> bool:
    from attnlab.core.catalog import mixer_info

    return mixer_info(name).supports.causal != ("no" if causal else "always")


def _as_data(cost: LayerCosts) -> dict[str, Any]:
    crossings: dict[str, Any] = {}
    for direction in ("forward", "training"):
        found = cost.crossover(direction)  # type: ignore[arg-type]
        crossings[direction] = None if found is None else asdict(found)
    return {**asdict(cost), "passed": cost.passed, "crossover": crossings}


def _print_tables(found: Sequence[LayerCosts], lengths: Sequence[int]) -> None:
    """A table a direction: time, and its ratio to softmax attention's, at each length."""
    from attnlab.compare.report.words import bytes_text, seconds_text

    screen = console()
    for direction, title in (("forward", "forward"), ("training", "forward and backward")):
        table = plain_table(
            title, *(f"{length:,} tokens" for length in lengths), "faster from", f"peak memory at {lengths[-1]:,}"
        )
        for cost in found:
            if not cost.passed:
                table.add_row(cost.mixer, *("not correct" for _ in lengths), "", str(cost.gate.get("error") or "the gate failed"))
                continue
            times = cost.times[direction]
            crossing = cost.crossover(direction)  # type: ignore[arg-type]
            table.add_row(
                cost.mixer,
                *(f"{seconds_text(times[n]['seconds'])}  {times[n]['ratio']:.2f}" for n in lengths),
                "" if crossing is None or cost.mixer == "softmax" else crossing.text,
                bytes_text(cost.memory[direction][lengths[-1]]),
            )
        screen.print(table)
        screen.print()
    threads = found[0].threads if found else 0
    plural = "" if threads == 1 else "s"
    screen.print(f"Time and ratio to softmax attention (SDPA) of the same size and causality; float32, {threads} thread{plural}.")
