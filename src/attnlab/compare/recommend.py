"""Which mechanism for what you need: those that qualify, ordered by what this machine has measured, and what is not known."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from attnlab.compare.costs import LayerCosts
from attnlab.compare.plan import PlannedTask
from attnlab.compare.reading import LEDGER, read_run
from attnlab.compare.summary import Score, Summary
from attnlab.compare.timing import Direction
from attnlab.core.catalog import list_mixers, mixer_info

Known = Literal["measured", "between", "beyond"]
"""How a number is known: at this length, between two measured lengths, or beyond them, by the growth seen."""


@dataclass(frozen=True)
class Need:
    """What is asked for.

    Args:
        length: tokens.
        causal: no token may see a later one.
        streaming: piece by piece, with a state.
        cross: reads keys from another sequence.
        grid: rank of the grid: 2 for images, 3 for video.
        memory: bytes that ``layers`` layers may take in training; with ``streaming``, their state.
        layers: how many layers share that memory.
        task: label of a task in the ledgers, by which quality counts; None leaves quality out.
        work: "training", "forward" (prefill) or "decode": what time counts.

    Raises:
        ValueError: for a length, a number of layers or a memory that is not positive.
    """

    length: int
    causal: bool = False
    streaming: bool = False
    cross: bool = False
    grid: int | None = None
    memory: int | None = None
    layers: int = 1
    task: str | None = None
    work: Direction = "training"

    def __post_init__(self) -> None:
        for name in ("length", "layers", "memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")

    @property
    def filters(self) -> dict[str, Any]:
        """As `list_mixers` takes them."""
        wanted = {"causal": self.causal, "streaming": self.streaming, "cross": self.cross}
        found: dict[str, Any] = {name: True for name, asked in wanted.items() if asked}
        return found if self.grid is None else {**found, "grid": self.grid}


@dataclass(frozen=True)
class Estimate:
    """A number and how it is known."""

    value: float
    known: Known


@dataclass(frozen=True)
class Suggestion:
    """A mechanism that qualifies, with what is known of it.

    Args:
        label: as the run calls it.
        mixer: its registered name.
        score: on the task asked for, if that was measured.
        seconds: of one layer at the length.
        ratio: of its time to softmax attention's.
        memory: bytes of one layer at the length; in training, or of the state where streaming was asked for.
        fits: whether the memory suffices; None where it is not known or was not asked.
        source: the ledger that its costs are from.
    """

    label: str
    mixer: str
    score: Score | None = None
    seconds: Estimate | None = None
    ratio: Estimate | None = None
    memory: Estimate | None = None
    fits: bool | None = None
    source: str = ""


@dataclass(frozen=True)
class Recommendation:
    """The answer.

    Args:
        need: what was asked for.
        suggestions: what qualifies and was measured, in order.
        too_large: what does not fit in the memory.
        unmeasured: names of what qualifies and was not measured.
        machines: processor of each ledger that was read.
        task: the task asked for, as a ledger describes it.
    """

    need: Need
    suggestions: tuple[Suggestion, ...]
    too_large: tuple[Suggestion, ...]
    unmeasured: tuple[str, ...]
    machines: Mapping[str, str] = field(default_factory=dict)
    task: PlannedTask | None = None


def find_ledgers(places: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Ledgers in some folders or directly below them, the newest first; a path of a ledger is taken as it is."""
    found: set[Path] = set()
    for place in map(Path, places):
        found |= {place} if place.is_file() else {*place.glob(LEDGER), *place.glob(f"*/{LEDGER}")}
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def recommend(need: Need, ledgers: Sequence[Path]) -> Recommendation:
    """Rank the mechanisms that qualify.

    Mechanisms with a score on the task come first, by the best rank that the tests leave open, so that those which cannot be
    told apart are ordered by time; then those with times alone. What does not fit in memory is set apart.

    Args:
        need: what is asked for.
        ledgers: of earlier comparisons, the newest first; of two measurements of one mechanism the newer counts.

    Raises:
        ValueError: for a task that no ledger has.
    """
    summaries = {str(path): read_run(path)[0] for path in ledgers}
    tasks = sorted({label for summary in summaries.values() for label in summary.tasks})
    if need.task is not None and need.task not in tasks:
        have = f"one of {', '.join(tasks)}" if tasks else "none, as no comparison has been run here"
        raise ValueError(f"task: expected {have}, got {need.task!r}; measure it with `attnlab compare --tasks {need.task}`")
    qualified = set(list_mixers(**need.filters))
    found: dict[str, Suggestion] = {}
    for source, summary in summaries.items():
        for suggestion in _suggestions(need, summary, source, qualified):
            found[suggestion.label] = _joined(found.get(suggestion.label), suggestion)
    known = [entry for entry in found.values() if entry.score is not None or entry.seconds is not None]
    measured = {entry.mixer for entry in known}
    order = sorted((entry for entry in known if entry.fits is not False), key=_order)
    return Recommendation(
        need,
        tuple(order),
        tuple(sorted((entry for entry in known if entry.fits is False), key=_order)),
        tuple(sorted(qualified - measured)),
        {source: str(summary.facts["machine"]["cpu"]) for source, summary in summaries.items()},
        next((summary.tasks[need.task] for summary in summaries.values() if need.task in summary.tasks), None),
    )


def _suggestions(need: Need, summary: Summary, source: str, qualified: set[str]) -> list[Suggestion]:
    found = []
    for label, mixer in summary.mixers.items():
        if mixer["name"] not in qualified:
            continue
        score = summary.score(need.task, label) if need.task in summary.tasks else None
        entry = Suggestion(label, mixer["name"], score if score is not None and score.interval is not None else None)
        cost = summary.costs.get(label)
        if cost is not None and cost.times and (cost.causal or not need.causal):
            entry = _with_costs(entry, need, cost, source)
        found.append(entry)
    return found


def _with_costs(entry: Suggestion, need: Need, cost: LayerCosts, source: str) -> Suggestion:
    times = cost.times.get(need.work, {})
    seconds = estimate({n: record["seconds"] for n, record in times.items()}, need.length)
    ratio = estimate({n: record["ratio"] for n, record in times.items()}, need.length)
    peaks = cost.state if need.streaming else cost.memory.get("training", {})
    # what is measured at one length alone grows as the mechanism promises that its time does
    exponent = (0.0 if mixer_info(entry.mixer).supports.state == "bounded" else 1.0) if need.streaming else 1.0
    memory = estimate({n: float(peak) for n, peak in peaks.items() if peak}, need.length, exponent)
    fits = None if need.memory is None or memory is None else memory.value * need.layers <= need.memory
    return replace(entry, seconds=seconds, ratio=ratio, memory=memory, fits=fits, source=source)


def _joined(newer: Suggestion | None, older: Suggestion) -> Suggestion:
    """What the newer measurement lacks, the older one adds."""
    if newer is None:
        return older
    if newer.seconds is None:
        newer = replace(older, score=newer.score)
    return replace(newer, score=newer.score or older.score)


def _order(entry: Suggestion) -> tuple[int, int, float, str]:
    place = entry.score.rank.best if entry.score is not None and entry.score.rank is not None else 10**6
    ratio = math.inf if entry.ratio is None else entry.ratio.value
    return (0 if entry.score is not None else 1, place, ratio, entry.label)


def estimate(values: Mapping[int, float], length: int, exponent: float | None = None) -> Estimate | None:
    """A quantity at a length, linear in both logarithms between measured lengths and, at the growth of the last two, beyond.

    Args:
        values: at measured lengths, positive.
        length: tokens.
        exponent: growth to take where one length alone was measured; None gives no estimate then.
    """
    known = sorted(values.items())
    if not known:
        return None
    if length in values:
        return Estimate(values[length], "measured")
    if len(known) == 1:
        [(at, value)] = known
        return None if exponent is None else Estimate(value * (length / at) ** exponent, "beyond")
    pairs = list(pairwise(known))
    inside = [pair for pair in pairs if pair[0][0] < length < pair[1][0]]
    (n1, v1), (n2, v2) = inside[0] if inside else pairs[0] if length < known[0][0] else pairs[-1]
    slope = math.log(v2 / v1) / math.log(n2 / n1)
    return Estimate(v1 * (length / n1) ** slope, "between" if inside else "beyond")
