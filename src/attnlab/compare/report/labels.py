"""Where to write the names beside the points of a scatter plot so that nothing overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LETTER, LINE, GAP, MARKER = 6.8, 12.0, 6.0, 5.0
"""Pixels: width of a letter, height of a line, from a point's centre to its label, half a marker."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """A point in pixels from the lower left corner, and its name."""

    x: float
    y: float
    name: str


def _box(point: Point, position: str) -> Box:
    width = LETTER * len(point.name)
    vertical, horizontal = position.split()
    x0 = {"left": point.x - GAP - width, "center": point.x - width / 2, "right": point.x + GAP}[horizontal]
    y0 = {"top": point.y + GAP, "middle": point.y - LINE / 2, "bottom": point.y - GAP - LINE}[vertical]
    return x0, y0, x0 + width, y0 + LINE


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


POSITIONS = (
    "middle right", "middle left", "top center", "bottom center", "top right", "bottom right", "top left", "bottom left",
)  # fmt: skip


def place_labels(points: Sequence[Point], width: float, height: float) -> list[str | None]:
    """For each point the position of its label as plotly names it, or None where there is no room.

    Earlier points have the first choice. A label stays inside the picture and off every point and every other label.

    Args:
        points: in pixels.
        width: of the picture.
        height: of the picture.
    """
    markers = [(p.x - MARKER, p.y - MARKER, p.x + MARKER, p.y + MARKER) for p in points]
    placed: list[Box] = []
    chosen: list[str | None] = []
    for point in points:
        found = None
        for position in POSITIONS:
            box = _box(point, position)
            inside = box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height
            if inside and not any(_overlap(box, other) for other in (*markers, *placed)):
                found = position
                placed.append(box)
                break
        chosen.append(found)
    return chosen
