"""The gallery: a card for every mixer, which a script on the page can filter by family, capability and text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from attnlab import mixer_info
from sitegen import facts, timings
from sitegen.plot import duration

CAPABILITIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "causal": ("causal", {"causal": True}),
    "two-sided": ("not causal", {"causal": "optional"}),
    "streams": ("streams", {"streaming": True}),
    "bounded": ("bounded state", {"state": "bounded"}),
    "cross": ("cross-attention", {"cross": True}),
    "pair-mask": ("pair mask", {"pair_mask": True}),
    "matrix": ("mixing matrix", {"mixing_matrix": True}),
    "grid-2": ("2-D grid", {"grid": 2}),
    "grid-3": ("3-D grid", {"grid": 3}),
    "orderless": ("blind to order", {"permutation_equivariant": True}),
    "varlen": ("packed sequences", {"varlen": True}),
    "pieces": ("parallel in pieces", {"associative": True}),
    "linear": ("linear cost", {"cost": 1.0}),
}
"""What can be asked for: a short name, the text on the page, and what `Supports.matches` is given."""

WIDTH, HEIGHT, MARGIN = 160, 44, 4


@dataclass(frozen=True)
class Card:
    """A mixer in the gallery.

    Args:
        name: its name.
        family: its family.
        headline: what it is, in a line.
        paper: title and year, or nothing.
        cost: cost in words.
        supports: short names of `CAPABILITIES` that it has.
        curve: its time against tokens as a drawing; empty if it was not timed.
    """

    name: str
    family: str
    headline: str
    paper: str
    cost: str
    supports: tuple[str, ...]
    curve: str

    @property
    def chips(self) -> list[str]:
        """What it supports, in words."""
        return [CAPABILITIES[name][0] for name in self.supports]


def capabilities(name: str) -> tuple[str, ...]:
    """Short names of what a mixer supports. One that is never causal is two-sided, too."""
    supports = mixer_info(name).supports
    found = [key for key, (_, wanted) in CAPABILITIES.items() if supports.matches(**wanted)]
    if supports.causal == "no":
        found.insert(0, "two-sided")
    return tuple(found)


def cards() -> list[Card]:
    """A card a mixer, in the order of families and names."""
    rows = {row["name"]: row for row in facts.mixer_rows()}
    data = timings.load()
    extent = span(data["mixers"])
    names = [name for members in facts.families().values() for name in members]
    return [
        Card(
            name=name,
            family=rows[name]["family"],
            headline=rows[name]["headline"],
            paper=rows[name]["paper"],
            cost=rows[name]["cost"],
            supports=capabilities(name),
            curve=curve(name, data["lengths"], data["mixers"].get(name, {}).get("forward", []), extent),
        )
        for name in names
    ]


def span(rows: Mapping[str, Any]) -> tuple[float, float]:
    """The shortest and the longest forward time of all mixers: curves that share their axes can be compared."""
    seconds = [value for row in rows.values() for time in row.get("forward", []) for value in (time["seconds"], time["baseline"])]
    return (min(seconds), max(seconds)) if seconds else (1e-3, 1.0)


def curve(name: str, lengths: Sequence[int], times: Sequence[Mapping[str, float]], extent: tuple[float, float]) -> str:
    """Forward time against tokens, both logarithmic, softmax attention's beside it; empty without times."""
    if not times:
        return ""
    first, last = times[0], times[-1]
    said = f"{duration(first['seconds'])} at {lengths[0]:,} tokens, {duration(last['seconds'])} at {lengths[-1]:,}"
    if name != "softmax":
        said += f"; softmax {duration(first['baseline'])} and {duration(last['baseline'])}"
    series = ["seconds"] if name == "softmax" else ["seconds", "baseline"]
    lines = "".join(
        f'<g class="series-{number}"><polyline points="{_points(lengths, [time[key] for time in times], extent)}"/></g>'
        for number, key in enumerate(series)
    )
    label = escape(f"Forward time: {said}")
    head = f'<svg class="plot spark" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return f"{head}<title>{label}</title>{lines}</svg>"


def _points(lengths: Sequence[int], seconds: Sequence[float], extent: tuple[float, float]) -> str:
    def place(value: float, low: float, high: float) -> float:
        return math.log(value / low) / math.log(high / low) if high > low else 0.5

    pairs = [
        (
            MARGIN + place(n, lengths[0], lengths[-1]) * (WIDTH - 2 * MARGIN),
            HEIGHT - MARGIN - place(value, *extent) * (HEIGHT - 2 * MARGIN),
        )
        for n, value in zip(lengths, seconds, strict=True)
    ]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)
