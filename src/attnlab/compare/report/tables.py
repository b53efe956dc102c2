"""The rows of the report's tables, as the template prints them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attnlab.compare.control import Tie
from attnlab.compare.plan import PlannedTask
from attnlab.compare.report.palette import Style
from attnlab.compare.report.words import METRICS, bytes_text, count_text, half_width_text, seconds_text, value_text
from attnlab.compare.suites import REFERENCE
from attnlab.compare.summary import Score, Summary


@dataclass(frozen=True)
class Entry:
    """A table cell: what is shown, what it is sorted by, smaller lines below, a class for the style sheet, a spread beside."""

    text: str
    sort: int | float | str | None = None
    notes: tuple[str, ...] = ()
    kind: str = ""
    spread: str = ""


@dataclass(frozen=True)
class TableRow:
    """A row of the main table."""

    mixer: str
    style: Style
    entries: list[Entry] = field(default_factory=list)


@dataclass(frozen=True)
class Column:
    """A column of the main table: heading, a smaller second line, and whether it sorts downward first."""

    title: str
    note: str = ""
    descending: bool = False


def columns(summary: Summary) -> list[Column]:
    """The main table's columns after the mechanism's name."""
    found = [
        Column(task.label, METRICS.get(task.metric, task.metric.replace("_", " ")), task.higher_is_better)
        for task in summary.tasks.values()
    ]
    found += [Column("parameters", "at most"), Column("training", "CPU time"), Column("tokens/s", "of CPU time", True)]
    if summary.costs:
        found += [
            Column("memory", "training"),
            Column("state", "streaming"),
            Column("FLOPs", "forward"),
            Column("faster from", "training"),
            Column("faster from", "forward"),
            Column("growth", "training"),
            Column("decoding", "tokens/s", True),
        ]
    return found


def columns_note(summary: Summary) -> str:
    """What the layer columns mean, with their lengths."""
    if not summary.costs:
        return ""
    last = _last_length(summary)
    return (
        f"Memory is the peak of one layer at {_longest(summary):,} tokens, state what a sequence carries after {last:,}, FLOPs "
        f"those of a layer's matrix products at {last:,}. “Faster from” is the length in tokens from which a layer beats "
        "softmax attention, with its 95 % interval where it lies within the measured range; growth is the exponent p of a time "
        f"that grows as n^p; decoding is how many tokens a second one sequence gains after {last:,}."
    )


def main_rows(summary: Summary, styles: Mapping[str, Style]) -> list[TableRow]:
    """A row a mixer."""
    return [TableRow(name, styles[name], _entries(summary, name)) for name in summary.mixers]


def baseline_rows(summary: Summary) -> list[list[Entry]]:
    """The trivial baselines, the best of each task in the first row."""
    tasks = list(summary.tasks.values())
    sides = [sorted(task.baselines["test"].items(), key=lambda item: item[1], reverse=task.higher_is_better) for task in tasks]
    return [
        [
            Entry(value_text(task, side[row][1]), notes=(side[row][0].replace("_", " "),)) if row < len(side) else Entry("")
            for task, side in zip(tasks, sides, strict=True)
        ]
        for row in range(max(map(len, sides), default=0))
    ]


def _entries(summary: Summary, name: str) -> list[Entry]:
    scores = [summary.score(label, name) for label in summary.tasks]
    found = [_quality(summary.tasks[score.task], score) for score in scores]
    known = [score for score in scores if score.parameters is not None]
    parameters = max((score.parameters or 0 for score in known), default=None)
    seconds = _mean([score.seconds for score in known if score.seconds])
    rate = _mean([score.tokens_per_second for score in known if score.tokens_per_second])
    found += [
        Entry(count_text(parameters), parameters),
        Entry(seconds_text(seconds), seconds),
        Entry(count_text(rate), rate),
    ]
    return found + (_cost_entries(summary, name) if summary.costs else [])


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _quality(task: PlannedTask, score: Score) -> Entry:
    if score.interval is None:
        return Entry({"excluded": "not possible"}.get(score.state, score.state), None, kind="absent")
    rank = f"rank {score.rank.text}" if score.rank is not None else ""
    notes = [note for note in (rank, score.reason) if note]
    kind = "best" if score.rank is not None and score.rank.position == 1 else ""
    if score.beats_baselines is False:
        notes, kind = [*notes, "below baseline"], "weak"
    spread = half_width_text(task, score.interval)
    return Entry(value_text(task, score.interval.mean), score.interval.mean, tuple(notes), kind, spread)


def _cost_entries(summary: Summary, name: str) -> list[Entry]:
    cost = summary.costs.get(name)
    if cost is None or not cost.times:
        reason = "not timed" if cost is None else "gate failed"
        return [Entry(reason, None, kind="absent") for _ in range(7)]
    memory = cost.memory["training"].get(_longest(summary))
    last = _last_length(summary)
    state, flops = cost.state.get(last), cost.flops.get(last)
    found = [Entry(bytes_text(memory), memory), Entry(bytes_text(state), state), Entry(count_text(flops), flops)]
    for direction in ("training", "forward"):
        crossing = cost.crossover(direction)
        if summary.mixers[name]["name"] == REFERENCE and not summary.mixers[name]["options"]:
            found.append(Entry("is softmax", None, kind="absent"))
        elif crossing is not None:
            order = crossing.length * {"always": 0.9, "at": 1.0, "never": 1.1}[crossing.where]
            kind, notes = "absent" if crossing.where == "never" else "", (crossing.interval,) if crossing.interval else ()
            found.append(Entry(crossing.text, order, notes, kind))
        else:
            found.append(Entry("–"))
    exponent, rate = cost.exponent("training"), cost.throughput("decode", last)
    return [*found, Entry("–" if exponent is None else f"n^{exponent:.2f}", exponent), Entry(count_text(rate), rate)]


def _longest(summary: Summary) -> int:
    """The longest length at which memory was measured."""
    return max((n for cost in summary.costs.values() for n in cost.memory.get("training", {})), default=0)


def _last_length(summary: Summary) -> int:
    return max((n for cost in summary.costs.values() for n in cost.flops), default=0)


def control_rows(summary: Summary) -> list[tuple[Tie, str, str, str, str]]:
    """The control: the tie, how far its parameters are apart, its difference, what is allowed, and the verdict in words."""
    rows = []
    for tie in summary.ties:
        task = summary.tasks[tie.task]
        scale, unit = (100.0, " points") if task.metric == "accuracy" else (1.0, "")
        difference = "–" if tie.difference is None else f"{scale * abs(tie.difference):.3g}{unit}"
        allowed = "rounding alone decides" if tie.allowed is None else f"{scale * tie.allowed:.3g}{unit}"
        rows.append(
            (tie, _power(tie.distance), difference, allowed, {True: "ties", False: "comes apart", None: "not decided"}[tie.holds])
        )
    return rows


def gate_rows(summary: Summary) -> list[tuple[str, list[str], str]]:
    """The gate: mixer, the six relative differences, and the verdict."""
    names = ("outputs64", "gradients64", "outputs32", "plain_outputs32", "gradients32", "plain_gradients32")
    rows = []
    for name, cost in summary.costs.items():
        values = [_power(cost.gate.get(part)) for part in names]
        error = cost.gate.get("error")
        rows.append((name, values, "passed" if cost.passed else f"failed{': ' + str(error) if error else ''}"))
    return rows


def _power(value: Any) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}"
