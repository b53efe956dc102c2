"""Pictures of time against length: a small panel a mechanism, with softmax attention and the crossover in each."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from attnlab.compare.costs import LayerCosts, softmax_seconds
from attnlab.compare.report.axes import GREY, figure
from attnlab.compare.report.palette import Style
from attnlab.compare.report.words import seconds_text
from attnlab.compare.summary import Summary
from attnlab.compare.timing import Direction


def time_figure(summary: Summary, cost: LayerCosts, style: Style, direction: Direction, span: tuple[float, float]) -> go.Figure:
    """Time against length on logarithmic axes.

    The mechanism's line is its paired ratio times softmax attention's median, so that drifts of the machine between one
    mechanism's measurement and another's cancel.

    Args:
        summary: gives softmax attention's times.
        cost: the mechanism's.
        style: its family's.
        direction: "forward" or "training".
        span: common range of all panels, in log10 seconds.
    """
    softmax = softmax_seconds(list(summary.costs.values()), direction, cost.causal)
    times = cost.times[direction]
    lengths = list(times)
    ours = [softmax[n] * times[n]["ratio"] for n in lengths]
    ticks = lengths[:: max(1, math.ceil(len(lengths) / 5))]
    decades = [10.0**k for k in range(math.ceil(span[0]), math.floor(span[1]) + 1)]
    found = figure(
        height=190,
        x={"type": "log", "tickvals": ticks, "ticktext": [_length(n) for n in ticks], "showgrid": False},
        y={"type": "log", "range": list(span), "tickvals": decades, "ticktext": [seconds_text(value) for value in decades]},
    )
    found.update_layout(margin={"l": 50, "r": 10, "t": 6, "b": 26})
    low = [softmax[n] * times[n]["ratio_low"] for n in lengths]
    high = [softmax[n] * times[n]["ratio_high"] for n in lengths]
    found.add_scatter(
        x=lengths + lengths[::-1], y=high + low[::-1], fill="toself", mode="none", fillcolor=_faint(style.color), hoverinfo="skip"
    )
    found.add_scatter(
        x=lengths, y=[softmax[n] for n in lengths], mode="lines", line={"color": GREY, "width": 1.6, "dash": "dash"},
        hovertemplate="softmax (SDPA)<br>%{x} tokens<br>%{customdata}<extra></extra>",
        customdata=[seconds_text(softmax[n]) for n in lengths],
    )  # fmt: skip
    found.add_scatter(
        x=lengths, y=ours, mode="lines+markers", line={"color": style.color, "width": 2},
        marker={"color": style.color, "size": 5},
        hovertemplate=f"<b>{cost.mixer}</b><br>%{{x}} tokens<br>%{{customdata}}<extra></extra>",
        customdata=[f"{seconds_text(t)}, {times[n]['ratio']:.2f} of softmax" for n, t in zip(lengths, ours, strict=True)],
    )  # fmt: skip
    crossing = cost.crossover(direction)
    if crossing is not None and crossing.where == "at":
        y = _interpolate(crossing.length, softmax)
        marker = {"size": 11, "symbol": "circle-open", "color": style.color, "line": {"width": 2, "color": style.color}}
        found.add_scatter(
            x=[crossing.length],
            y=[y],
            mode="markers",
            marker=marker,
            hovertemplate=f"faster from {crossing.text} tokens on<extra></extra>",
        )
    return found


def common_span(summary: Summary, direction: Direction) -> tuple[float, float]:
    """Log10 of the least and the largest time of all panels, with a margin."""
    seconds = [
        value
        for cost in summary.costs.values()
        for row in cost.times.get(direction, {}).values()
        for value in (row["seconds"], row["baseline"])
    ]
    if not seconds:
        return -4.0, 0.0
    return math.log10(min(seconds)) - 0.15, math.log10(max(seconds)) + 0.15


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _interpolate(length: float, times: dict[int, float]) -> float:
    """A time between measured lengths, linear in both logarithms."""
    lengths = sorted(times)
    above = next(i for i, n in enumerate(lengths) if n >= length)
    left, right = lengths[max(0, above - 1)], lengths[above]
    if left == right:
        return times[left]
    share = (math.log(length) - math.log(left)) / (math.log(right) - math.log(left))
    return math.exp((1 - share) * math.log(times[left]) + share * math.log(times[right]))
