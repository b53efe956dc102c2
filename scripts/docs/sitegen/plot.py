"""The measured times of a mixer as a small drawing, inline SVG whose colours follow the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 250, 58, 12, 14, 40


def duration(seconds: float) -> str:
    """Seconds as text with three digits: "0.42 ms", "13.1 ms", "1.2 s"."""
    if seconds >= 1.0:
        return f"{seconds:.3g} s"
    milli = seconds * 1e3
    return f"{milli:.0f} ms" if milli >= 100 else f"{milli:.3g} ms"


def log_log(lengths: Sequence[int], series: Mapping[str, Sequence[float]], title: str) -> str:
    """Lines over lengths, both axes logarithmic; the first series is the one that the page is about."""
    values = [value for line in series.values() for value in line]
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))
    if high == low:
        high = 10 * low

    def across(length: float) -> float:
        share = math.log(length / lengths[0]) / math.log(lengths[-1] / lengths[0]) if len(lengths) > 1 else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(seconds: float) -> float:
        return TOP + (1 - math.log(seconds / low) / math.log(high / low)) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        y = down(10.0**power)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{duration(10.0**power)}</text>')
    for length in lengths:
        anchor = "end" if length == lengths[-1] else "middle"
        parts.append(f'<text x="{across(length):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="{anchor}">{length}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">tokens</text>')
    for number, (name, line) in enumerate(series.items()):
        points = [(across(length), down(value)) for length, value in zip(lengths, line, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<g class="series-{number}"><title>{escape(name)}</title><polyline points="{path}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points]
        parts.append("</g>")
    return "".join([*parts, "</svg>"])
