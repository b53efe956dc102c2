"""Measured times of every mixer against softmax attention, kept in ``docs/data/timings.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from attnlab import list_mixers
from attnlab.compare.crossover import crossover
from attnlab.compare.gate import gate
from attnlab.compare.layers import Layer, can_be_causal
from attnlab.compare.machine import machine_facts
from attnlab.compare.timing import Direction, time_layer

CACHE = Path(__file__).parents[3] / "docs" / "data" / "timings.json"
LENGTHS = (256, 512, 1024, 2048)
DIM, HEADS = 128, 4
DIRECTIONS: tuple[Direction, ...] = ("forward", "training")


def measure(
    names: Sequence[str] | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    seconds: float = 0.8,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time mixers in interleaved pairs with softmax attention of the same form; one that fails the gate gets no time.

    Args:
        names: mixers; all by default.
        lengths: tokens, rising.
        seconds: about how long a length takes, for each direction.
        say: gets a line for each mixer.
    """
    rows = {}
    for name in list_mixers() if names is None else names:
        layer = Layer(name, can_be_causal(name), DIM, HEADS)
        agreement = gate(layer)
        rows[name] = {"causal": layer.causal, "gate": agreement.record()}
        if agreement.passed:
            for direction in DIRECTIONS:
                times = [time_layer(layer, n, direction, seconds=seconds, pairs=5) for n in lengths]
                rows[name][direction] = [time.record() for time in times]
        say(f"{name}: {'timed' if agreement.passed else f'failed the gate: {agreement}'}")
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine_facts(measure=False),
        "dim": DIM,
        "num_heads": HEADS,
        "lengths": list(lengths),
        "mixers": rows,
    }


def load(path: Path = CACHE) -> dict[str, Any]:
    """The recorded times; without a file, none of any mixer."""
    if not path.exists():
        return {"lengths": list(LENGTHS), "mixers": {}, "note": ""}
    return json.loads(path.read_text(encoding="utf-8"))


def save(data: dict[str, Any], path: Path = CACHE) -> None:
    """Write the times, a line a number's row, so that a new measurement shows what changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def verdict(data: dict[str, Any], name: str, direction: Direction) -> str:
    """From which length on the mixer beats softmax attention, in words; an empty string where it was not timed."""
    times = data["mixers"].get(name, {}).get(direction)
    return crossover(data["lengths"], [row["ratio"] for row in times]).sentence if times else ""
