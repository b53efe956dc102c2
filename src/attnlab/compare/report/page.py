"""Putting the page together: numbers, pictures, template, style sheet and plotly, in one file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from attnlab.compare.frame import write_text
from attnlab.compare.report import quality, speed, tables, words
from attnlab.compare.report.palette import Style, mixer_styles
from attnlab.compare.suites import REFERENCE
from attnlab.compare.summary import Score, Summary
from attnlab.compare.timing import Direction

INFERENCE: dict[Direction, str] = {"forward": "Forward alone (prefill)", "decode": "One more token (decoding)"}
VERSUS = {"better": "better than softmax", "worse": "worse than softmax", "cannot tell": "cannot be told from softmax"}


@dataclass(frozen=True)
class Citation:
    """A paper as the report cites it."""

    title: str
    year: int
    arxiv: str | None = None


@dataclass(frozen=True)
class Picture:
    """A figure of the page: its identifier, what it shows in words, the figure as JSON, and the mixer if it shows one alone."""

    name: str
    heading: str
    description: str
    json: str
    mixer: str = ""

    @classmethod
    def of(cls, name: str, heading: str, description: str, figure: go.Figure, mixer: str = "") -> Picture:
        """Serialise a figure so that it can stand inside a script element."""
        return cls(name, heading, description, figure.to_json().replace("</", "<\\/"), mixer)


def write_report(path: Path, summary: Summary, *, citations: Mapping[str, Citation]) -> None:
    """Write the report; an earlier one of the same path is replaced in one step.

    Args:
        path: the file.
        summary: what is reported.
        citations: papers by slug, for links.
    """
    write_text(path, render(summary, citations))


def render(summary: Summary, citations: Mapping[str, Citation]) -> str:
    """The page as HTML."""
    folder = files("attnlab.compare.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"bytes": words.bytes_text, "count": words.count_text, "seconds": words.seconds_text}
    template = environment.from_string(folder.joinpath("template.html.j2").read_text(encoding="utf-8"))
    styles = mixer_styles(summary.mixers)
    return template.render(
        summary=summary,
        facts=summary.facts,
        machine=summary.facts["machine"],
        date=time.strftime("%d %B %Y, %H:%M", time.localtime(summary.facts["started"])).lstrip("0"),
        headlines=words.headlines(summary),
        limits=words.limits(summary),
        exclusions=words.exclusions(summary),
        columns=tables.columns(summary),
        columns_note=tables.columns_note(summary),
        rows=tables.main_rows(summary, styles),
        baselines=tables.baseline_rows(summary),
        control=tables.control_rows(summary),
        gates=tables.gate_rows(summary),
        legend=_legend(styles),
        quality=list(_quality_pictures(summary, styles)),
        tradeoffs=list(_tradeoffs(summary, styles)),
        speeds=[(form, list(_speed_pictures(summary, styles, form))) for form in (True, False)],
        inference=[(text, list(_inference_pictures(summary, styles, direction))) for direction, text in INFERENCE.items()],
        training=list(_training_pictures(summary, styles)),
        gallery=_gallery(summary),
        filters=_filters(summary),
        cards=[_card(summary, name, styles[name], citations) for name in summary.mixers],
        metric_name=words.metric_name,
        css=folder.joinpath("style.css").read_text(encoding="utf-8"),
        script=folder.joinpath("report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        reference=REFERENCE,
    )


def _legend(styles: Mapping[str, Style]) -> list[tuple[Style, list[str]]]:
    families: dict[str, tuple[Style, list[str]]] = {}
    for name, style in styles.items():
        families.setdefault(style.family, (style, []))[1].append(name)
    return list(families.values())


def _quality_pictures(summary: Summary, styles: dict[str, Style]) -> Iterator[Picture]:
    for label, task in summary.tasks.items():
        if words.ordered(summary, task):
            text = f"Test {words.metric_name(task)}, by mechanism, with every seed and the trivial baselines"
            yield Picture.of(f"quality-{label}", label, text, quality.quality(summary, task, styles))


def _tradeoffs(summary: Summary, styles: dict[str, Style]) -> Iterator[Picture]:
    def memory(score: Score) -> int | float | None:
        cost = summary.costs.get(score.mixer)
        return None if cost is None or not cost.memory else cost.memory["training"].get(longest)

    longest = max((n for cost in summary.costs.values() for n in cost.memory.get("training", {})), default=0)
    costs = [("time", "CPU time of a training run", "s", lambda score: score.seconds)]
    if longest:
        costs.append(("memory", f"peak memory of a layer in training, {longest:,} tokens", "B", memory))
    for name, title, unit, cost in costs:
        for label, task in summary.tasks.items():
            if words.ordered(summary, task):
                picture = quality.against(summary, task, styles, cost, title, unit)
                yield Picture.of(f"{name}-{label}", label, f"Test {words.metric_name(task)}, against {title}", picture)


def _speed_pictures(summary: Summary, styles: dict[str, Style], causal: bool) -> Iterator[Picture]:
    span = speed.common_span(summary, "training")
    for name, cost in summary.costs.items():
        crossing = cost.crossover("training")
        if cost.causal == causal and crossing is not None and not _is_baseline(summary, name):
            figure = speed.time_figure(summary, cost, styles[name], "training", span)
            yield Picture.of(f"speed-{name}", name, f"{name}: {crossing.sentence}", figure, name)


def _inference_pictures(summary: Summary, styles: dict[str, Style], direction: Direction) -> Iterator[Picture]:
    span = speed.common_span(summary, direction)
    for name, cost in summary.costs.items():
        crossing = cost.crossover(direction)
        if crossing is not None and not _is_baseline(summary, name):
            figure = speed.time_figure(summary, cost, styles[name], direction, span)
            yield Picture.of(f"{direction}-{name}", name, f"{name}: {crossing.sentence}", figure, name)


def _training_pictures(summary: Summary, styles: dict[str, Style]) -> Iterator[Picture]:
    for label, task in summary.tasks.items():
        if words.ordered(summary, task):
            text = f"Validation {words.metric_name(task)}, at each learning rate of the sweep"
            yield Picture.of(f"rates-{label}", f"{label}: learning rates", text, quality.rates(summary, task, styles))
    for label, task in summary.tasks.items():
        if words.ordered(summary, task):
            text = "Training loss at the chosen rate, mean over seeds"
            yield Picture.of(f"curves-{label}", f"{label}: learning curves", text, quality.curves(summary, task, styles))


def _gallery(summary: Summary) -> list[tuple[str, list[tuple[str, list[dict[str, Any]]]]]]:
    """For each task the mixers with their layers' matrices, those without left out."""
    found = []
    for label in summary.tasks:
        entries = [(name, layers) for name in summary.mixers if (layers := summary.gallery.get((label, name)))]
        found += [(label, entries)] if entries else []
    return found


def _filters(summary: Summary) -> list[str]:
    """What mechanisms can be filtered by: promises that some have and some have not."""
    flags = [_flags(mixer["supports"]) for mixer in summary.mixers.values()]
    return sorted({flag for own in flags for flag in own if not all(flag in other for other in flags)})


def _flags(supports: Mapping[str, Any]) -> list[str]:
    """What a mixer supports, a few words each."""
    found = [
        f"causal: {supports['causal']}",
        f"state: {supports['state']}",
        "cost: n" + {1: "", 2: "²", 3: "³"}.get(supports["cost"], f"^{supports['cost']:g}"),
    ]
    found += [
        flag.replace("_", " ")
        for flag in ("streaming", "cross", "pair_mask", "mixing_matrix", "permutation_equivariant")
        if supports[flag]
    ]
    return [*found, "grid rank " + "/".join(str(rank) for rank in supports["grid"])]


def _is_baseline(summary: Summary, name: str) -> bool:
    return summary.mixers[name]["name"] == REFERENCE and not summary.mixers[name]["options"]


def _card(summary: Summary, name: str, style: Style, citations: Mapping[str, Citation]) -> dict[str, Any]:
    mixer = summary.mixers[name]
    lines = []
    for label, task in summary.tasks.items():
        score = summary.score(label, name)
        if score.interval is None:
            lines.append((label, score.reason or score.state))
            continue
        text = f"{words.value_text(task, score.interval.mean)} at rate {score.rate:g}, width {score.width}"
        if score.versus is not None:
            text += f"; {VERSUS[score.versus]}"
        lines.append((label, text))
    cost = summary.costs.get(name)
    crossing = cost.crossover("training") if cost is not None and not _is_baseline(summary, name) else None
    if crossing is not None:
        lines.append(("speed", f"in training {crossing.sentence}"))
    options = {**mixer["options"]}
    for task_facts in summary.facts["suite"]["tasks"]:
        for option, value in task_facts["mixer_options"].get(name, {}).items():
            options[f"{option} ({task_facts['label']})"] = value
    return {
        "name": name,
        "mixer": mixer,
        "summary": words.plain_text(mixer["summary"]),
        "style": style,
        "flags": _flags(mixer["supports"]),
        "lines": lines,
        "options": options,
        "citation": citations.get(mixer["paper"] or ""),
    }
