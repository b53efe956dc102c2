"""Colours and marks by family: the same in every picture, readable on light and dark, told apart by shape as well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

REFERENCE_COLOR = "#80868f"
"""Softmax attention and baselines: what others are held against."""

_GROUPS = (
    ("#3f7fd1", {"dense", "heads", "cross"}),
    ("#d47a1f", {"local", "sparse"}),
    ("#159582", {"linear"}),
    ("#c2505a", {"recurrent", "memory"}),
)
_OTHER = "#8a6fb8"
_SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "pentagon", "star", "hexagon", "x")
_SIGNS = ("●", "■", "◆", "▲", "▼", "✚", "⬟", "★", "⬢", "✖")


@dataclass(frozen=True)
class Style:
    """How a family is drawn: colour, plotly's symbol, and the sign of it that text can show."""

    family: str
    color: str
    symbol: str
    sign: str


def family_styles(families: Iterable[str]) -> dict[str, Style]:
    """A style for each family: related families share a colour, and each has a shape of its own (beyond ten they repeat)."""
    names = list(dict.fromkeys(families))
    hues = {name: next((hue for hue, group in _GROUPS if name in group), _OTHER) for name in names}
    return {name: Style(name, hues[name], _SHAPES[i % 10], _SIGNS[i % 10]) for i, name in enumerate(names)}


def mixer_styles(mixers: Mapping[str, Mapping[str, str]]) -> dict[str, Style]:
    """The style of each mixer by label."""
    styles = family_styles(mixer["family"] or "other" for mixer in mixers.values())
    return {label: styles[mixer["family"] or "other"] for label, mixer in mixers.items()}
