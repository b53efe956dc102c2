"""The four problems: what is drawn, the exact answer in its published order, and what the rules leave to guess."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from attnlab.tasks.pointing.tours import MOST_CITIES, shortest_tours

Answers = list[int]


@dataclass(frozen=True)
class Problem:
    """A function of a set of points whose value is a sequence of their positions.

    Args:
        dim: numbers a point, uniform in [0, 1).
        least: points that it needs.
        most: points up to which it is solved exactly; None for any number.
        solve: points (count, n, dim) to the answers of each example, from 0, without the end.
        most_answers: answers that n points may have, without the end.
        choices: number of points and the answers before to the number of answers, the end included, that the rules allow.
        once: whether a point is answered at most once.
        fixed_length: whether all points are answered.
    """

    dim: int
    least: int
    most: int | None
    solve: Callable[[Float[np.ndarray, "b n d"]], list[Answers]]
    most_answers: Callable[[int], int]
    choices: Callable[[int, Sequence[int]], int]
    once: bool
    fixed_length: bool


def sorted_order(points: Float[np.ndarray, "b n 1"]) -> list[Answers]:
    """Positions in rising order of the numbers."""
    return np.argsort(points[..., 0], axis=1, kind="stable").tolist()


def hull_order(points: Float[np.ndarray, "b n 2"]) -> list[Answers]:
    """Vertices of the convex hull, counter-clockwise from the one that comes first in the input."""
    from scipy.spatial import ConvexHull  # type: ignore[import-untyped]

    found = []
    for one in points:
        vertices = ConvexHull(one).vertices.tolist()  # in the plane, counter-clockwise
        first = vertices.index(min(vertices))
        found.append(vertices[first:] + vertices[:first])
    return found


def incentres(points: Float[np.ndarray, "n 2"], triangles: np.ndarray) -> Float[np.ndarray, "t 2"]:
    """Centre of each triangle's inscribed circle: its corners, weighted by the opposite sides."""
    corners = points[triangles]
    sides = np.linalg.norm(corners[:, [1, 2, 0]] - corners[:, [2, 0, 1]], axis=-1)
    return (corners * sides[..., None]).sum(1) / sides.sum(1, keepdims=True)


def delaunay_order(points: Float[np.ndarray, "b n 2"]) -> list[Answers]:
    """Corners of the Delaunay triangles, each triple rising, the triples by x and then y of their incentres."""
    from scipy.spatial import Delaunay

    found = []
    for one in points:
        triangles = np.sort(Delaunay(one).simplices, axis=1)
        centres = incentres(one, triangles)
        order = np.lexsort((centres[:, 1], centres[:, 0]))
        found.append(triangles[order].flatten().tolist())
    return found


def tour_order(points: Float[np.ndarray, "b n 2"]) -> list[Answers]:
    """The shortest tour from city 0; the end stands for the way back."""
    return shortest_tours(points).tolist()


def _of_orders(n: int, before: Sequence[int]) -> int:
    return max(1, n - len(before))


def _of_tours(n: int, before: Sequence[int]) -> int:
    return 1 if not before else _of_orders(n, before)


def _of_hulls(n: int, before: Sequence[int]) -> int:
    """The first has two points behind it in the input at least; then any point behind it, and from three on the end."""
    if not before:
        return n - 2
    return n - 1 - before[0] - (len(before) - 1) + (len(before) >= 3)


def _of_triangles(n: int, before: Sequence[int]) -> int:
    """Corners of a triple rise, and leave room for the others."""
    corner = len(before) % 3
    if corner == 0:
        return n - 2 + (len(before) > 0)
    return n - 1 - before[-1] - (corner == 1)


PROBLEMS = {
    "sorting": Problem(1, 2, None, sorted_order, lambda n: n, _of_orders, once=True, fixed_length=True),
    "convex_hull": Problem(2, 3, None, hull_order, lambda n: n, _of_hulls, once=True, fixed_length=False),
    "delaunay": Problem(2, 3, None, delaunay_order, lambda n: 3 * (2 * n - 5), _of_triangles, once=False, fixed_length=False),
    "tsp": Problem(2, 3, MOST_CITIES, tour_order, lambda n: n, _of_tours, once=True, fixed_length=True),
}
"""By name."""
