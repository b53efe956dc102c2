"""Pictures of quality: by mechanism, against time and memory, over learning rates, and over training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from attnlab.compare.plan import PlannedTask
from attnlab.compare.report.axes import GREY, PLOT_HEIGHT, PLOT_WIDTH, figure, padded
from attnlab.compare.report.labels import Point, place_labels
from attnlab.compare.report.palette import Style
from attnlab.compare.report.words import METRICS, bytes_text, half_width_text, ordered, seconds_text, value_text
from attnlab.compare.summary import Score, Summary

Styles = dict[str, Style]


def _axis(task: PlannedTask) -> dict[str, object]:
    title = METRICS.get(task.metric, task.metric.replace("_", " "))
    return {"title": {"text": title}, "tickformat": ".3~p" if task.metric == "accuracy" else ".3~g"}


def _metric_span(task: PlannedTask, values: Sequence[float], share: float) -> tuple[float, float]:
    """The range of the metric's axis, the worse end first: better is always to the right, or up."""
    low, high = padded(values, share)
    if task.metric == "accuracy":
        low, high = max(-0.02, low), min(1.03, high)
    return (low, high) if task.higher_is_better else (high, low)


def _place(value: float, span: tuple[float, float]) -> float:
    """Where a value lies on an axis, from 0 to 1."""
    return (value - span[0]) / (span[1] - span[0])


def _near(task: PlannedTask, values: Sequence[float]) -> dict[str, float]:
    """The baselines that leave the mechanisms room: the best one, and those no further from them than they spread twice over."""
    baselines = task.baselines["test"]
    best = max(baselines.values()) if task.higher_is_better else min(baselines.values())
    low, high = min([*values, best]), max([*values, best])
    room = 2 * (high - low)
    return {name: value for name, value in baselines.items() if low - room <= value <= high + room}


def quality(summary: Summary, task: PlannedTask, styles: Styles) -> go.Figure:
    """Each mechanism a row, best on top: mean with interval, every seed, and the trivial baselines as lines."""
    scores = ordered(summary, task)[::-1]
    names = [score.mixer for score in scores]
    values = [value for score in scores for value in score.test]
    baselines = _near(task, values)
    span = _metric_span(task, [*values, *baselines.values()], 0.08)
    found = figure(height=70 + 24 * len(names), x={**_axis(task), "range": list(span)}, y={"range": [-0.6, len(names) - 0.2]})
    found.update_layout(margin={"l": 112, "r": 14, "t": 24, "b": 42})
    found.update_yaxes(tickvals=list(range(len(names))), ticktext=names, showgrid=False)
    for name, value in baselines.items():
        found.add_vline(value, line={"color": GREY, "width": 1, "dash": "dot"})
        near_right = _place(value, span) > 0.6
        found.add_annotation(
            x=value, y=1, yref="paper", yanchor="bottom", xanchor="right" if near_right else "left",
            text=name.replace("_", " "), showarrow=False, font={"size": 10}, yshift=2 + 10 * (list(baselines).index(name) % 2),
        )  # fmt: skip
    for row, score in enumerate(scores):
        style, interval = styles[score.mixer], score.interval
        if interval is None:
            continue
        if interval.low is not None and interval.high is not None:
            ends = [max(min(span), interval.low), min(max(span), interval.high)]
            line = {"color": style.color, "width": 2}
            found.add_scatter(x=ends, y=[row, row], mode="lines", line=line, opacity=0.4, hoverinfo="skip")
        seeds = {"color": style.color, "size": 5, "opacity": 0.6, "symbol": "circle-open"}
        found.add_scatter(x=list(score.test), y=[row] * len(score.test), mode="markers", marker=seeds, hoverinfo="skip")
        text = f"<b>{score.mixer}</b><br>{value_text(task, interval.mean)} {half_width_text(task, interval)}<extra></extra>"
        mean = {"color": style.color, "size": 9, "symbol": style.symbol}
        found.add_scatter(x=[interval.mean], y=[row], mode="markers", marker=mean, hovertemplate=text)
    return found


def against(
    summary: Summary, task: PlannedTask, styles: Styles, cost: Callable[[Score], int | float | None], title: str, unit: str
) -> go.Figure:
    """Mean quality against a cost on a logarithmic axis; points that no other beats in both are joined."""
    known = [(score, float(value)) for score in ordered(summary, task) if (value := cost(score))]
    if not known:
        return figure()
    means = [score.interval.mean if score.interval else 0.0 for score, _ in known]
    x_span = padded([math.log10(value) for _, value in known], 0.2)
    if x_span[1] - x_span[0] < 0.5:
        middle = sum(x_span) / 2
        x_span = (middle - 0.25, middle + 0.25)
    y_span = _metric_span(task, means, 0.14)
    axis = {"type": "log", "range": list(x_span), "title": {"text": title}, **_cost_ticks(x_span, unit)}
    found = figure(x=axis, y={**_axis(task), "range": list(y_span)})
    front = _front(task, known)
    found.add_scatter(
        x=[value for _, value in front], y=[s.interval.mean if s.interval else 0.0 for s, _ in front],
        mode="lines", line={"color": GREY, "width": 1, "dash": "dot"}, hoverinfo="skip",
    )  # fmt: skip
    order = [*front, *(entry for entry in known if entry not in front)]
    points = [
        Point(
            _place(math.log10(value), x_span) * PLOT_WIDTH,
            _place(score.interval.mean if score.interval else 0.0, y_span) * PLOT_HEIGHT,
            score.mixer,
        )
        for score, value in order
    ]
    text = bytes_text if unit == "B" else seconds_text
    for (score, value), position in zip(order, place_labels(points, PLOT_WIDTH, PLOT_HEIGHT), strict=True):
        style, mean = styles[score.mixer], score.interval.mean if score.interval else 0.0
        found.add_scatter(
            x=[value], y=[mean], mode="markers" if position is None else "markers+text", text=[score.mixer],
            textposition=position or "middle right", textfont={"size": 10.5}, cliponaxis=False,
            marker={"color": style.color, "size": 9, "symbol": style.symbol},
            hovertemplate=f"<b>{score.mixer}</b><br>{value_text(task, mean)}<br>{text(value)}<extra></extra>",
        )  # fmt: skip
    return found


def _cost_ticks(span: tuple[float, float], unit: str) -> dict[str, object]:
    """Ticks at 1, 2 and 5 times powers of ten of seconds, or at powers of two of bytes, thinned to six at most."""
    low, high = 10 ** span[0], 10 ** span[1]
    if unit == "B":
        values = [2.0**k for k in range(0, 45)]
    else:
        values = [m * 10.0**k for k in range(-7, 6) for m in (1, 2, 5)]
    inside = [value for value in values if low <= value <= high]
    inside = inside[:: max(1, math.ceil(len(inside) / 6))] or [10 ** (sum(span) / 2)]
    return {"tickvals": inside, "ticktext": [bytes_text(v) if unit == "B" else seconds_text(v) for v in inside]}


def _front(task: PlannedTask, known: Sequence[tuple[Score, float]]) -> list[tuple[Score, float]]:
    """Those that no other is as good as at less cost, by rising cost."""
    front: list[tuple[Score, float]] = []
    for score, value in sorted(known, key=lambda entry: entry[1]):
        mean = score.interval.mean if score.interval else 0.0
        last = front[-1][0].interval if front else None
        if last is None or task.better(mean, last.mean):
            front.append((score, value))
    return front


def rates(summary: Summary, task: PlannedTask, styles: Styles) -> go.Figure:
    """The sweep: validation metric at each learning rate, the chosen one filled."""
    swept = [score for score in summary.scores if score.task == task.label and score.sweep]
    values = sorted({rate for score in swept for rate, _ in score.sweep})
    ticks = {"tickvals": values, "ticktext": [f"{value:g}" for value in values]}
    span = padded([math.log10(value) for value in values], 0.12) if values else (-3, -2)
    found = figure(x={"type": "log", "range": list(span), "title": {"text": "learning rate"}, **ticks}, y=_axis(task))
    for score in swept:
        style = styles[score.mixer]
        known = [(rate, value) for rate, value in score.sweep if value is not None]
        marks = [style.symbol if rate == score.rate else f"{style.symbol}-open" for rate, _ in known]
        found.add_scatter(
            x=[rate for rate, _ in known], y=[value for _, value in known], mode="lines+markers", opacity=0.85,
            line={"color": style.color, "width": 1.3}, marker={"color": style.color, "size": 7, "symbol": marks},
            hovertemplate=f"<b>{score.mixer}</b><br>rate %{{x:g}}<br>%{{y:.4~g}}<extra></extra>",
        )  # fmt: skip
    return found


def curves(summary: Summary, task: PlannedTask, styles: Styles) -> go.Figure:
    """Training loss at the chosen rate, mean over seeds."""
    found = figure(x={"title": {"text": "step"}, "rangemode": "tozero"}, y={"title": {"text": "training loss, nats"}})
    for score in ordered(summary, task):
        curves = [curve for curve in score.curves if len(curve) == len(score.curves[0])]
        rows = [(points[0][0], [p[1] for p in points if p[1] is not None]) for points in zip(*curves, strict=True)]
        kept = [(step, sum(losses) / len(losses)) for step, losses in rows if losses]
        found.add_scatter(
            x=[step for step, _ in kept], y=[loss for _, loss in kept], mode="lines", opacity=0.9,
            line={"color": styles[score.mixer].color, "width": 1.5},
            hovertemplate=f"<b>{score.mixer}</b><br>step %{{x}}<br>%{{y:.3f}} nats<extra></extra>",
        )  # fmt: skip
    return found
