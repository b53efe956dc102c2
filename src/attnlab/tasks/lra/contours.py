"""Geometry of Pathfinder's contours: steps on the pixel grid, and where the next segment may end."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

Point = tuple[int, int]
"""(row, column)."""


def translate(point: Point, angle: float, distance: int) -> Point:
    r"""$\lceil p + d\,(\sin\theta, \cos\theta) \rceil$."""
    return (
        math.ceil(point[0] + distance * float(np.sin(angle))),
        math.ceil(point[1] + distance * float(np.cos(angle))),
    )


def opposite(angle: float) -> float:
    r"""The other direction of ``angle``, in $[-\pi, \pi]$ as it."""
    return angle + math.pi if angle < 0 else angle - math.pi


@lru_cache(maxsize=30_000)
def end_points(pivot: Point, radius: int, size: int) -> tuple[Int[np.ndarray, "k 2"], Float[np.ndarray, "k"]]:
    """Pixels of a canvas of side ``size`` on the circle around ``pivot``, in rising order, and their angles.

    The circle is sampled every pixel of its circumference from angle 0 on; samples are truncated to pixels, each counts once.
    """
    angles = np.arange(0, 360, 360.0 / (2 * radius * np.pi)) * np.pi / 180
    samples = np.stack((pivot[0] + radius * np.sin(angles), pivot[1] + radius * np.cos(angles)), 1)
    inside = ((samples >= 0) & (samples < size)).all(1)
    points = np.unique(samples[inside].astype(np.int64), axis=0)
    offsets = points - np.array(pivot)
    return points, np.arctan2(offsets[:, 0], offsets[:, 1])


def end_weights(
    angles: Float[np.ndarray, "k"], free: Float[np.ndarray, "k"], angle: float, continuity: float
) -> Float[np.ndarray, "k"] | None:
    r"""Chance of each end point, proportional to $f \cos^2 \min(c\,|\Delta\theta|, \pi/2)$; None where all are as good as taken.

    Args:
        angles: of the end points, seen from the pivot.
        free: f, how free each is, from 0 to 1.
        angle: the direction that the contour has.
        continuity: c, the larger, the straighter.
    """
    turn = np.abs(angles - angle)
    turn = np.minimum(np.minimum(turn, 2 * np.pi - turn) * continuity, 0.5 * np.pi)
    weights = free * np.maximum(np.cos(turn), 0) ** 2
    total = weights.sum()
    return None if total < 1e-4 else weights / total
