"""What a decoded sequence is worth: exactness, area of a hull, triangles of a triangulation, length of a tour."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from attnlab.models.pointer import PointerNetwork, greedy_answers
from attnlab.tasks.contract import Split
from attnlab.tasks.pointing.task import Pointing, answers_of

Points = Float[np.ndarray, "n d"]


def polygon_area(corners: Float[np.ndarray, "k 2"]) -> float:
    """Area of a simple polygon, positive where its corners go round counter-clockwise."""
    following = np.roll(corners, -1, axis=0)
    return 0.5 * float((corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]).sum())


def is_simple(corners: Float[np.ndarray, "k 2"]) -> bool:
    """Whether a closed polygon of at least three corners, no three of them on a line, does not cross itself."""
    k = len(corners)
    if k < 3:
        return False

    def left(a: int, b: int, c: int) -> bool:
        (ax, ay), (bx, by), (cx, cy) = corners[a], corners[b], corners[c]
        return bool((bx - ax) * (cy - ay) > (by - ay) * (cx - ax))

    for a in range(k):
        for c in range(a + 2, k - (a == 0)):
            b, d = a + 1, (c + 1) % k
            if left(a, c, d) != left(b, c, d) and left(a, b, c) != left(a, b, d):
                return False
    return True


def area_coverage(points: Points, answers: Sequence[int], truth: Sequence[int]) -> float:
    """Share of the true hull's area that the answered polygon covers; NaN where this is no simple polygon."""
    if len(set(answers)) < len(answers) or not is_simple(points[list(answers)]):
        return float("nan")
    return abs(polygon_area(points[list(answers)])) / polygon_area(points[list(truth)])


def triangles_of(answers: Sequence[int]) -> set[frozenset[int]]:
    """The complete triples of different points."""
    triples = (frozenset(answers[start : start + 3]) for start in range(0, len(answers) - 2, 3))
    return {triple for triple in triples if len(triple) == 3}


def triangle_coverage(answers: Sequence[int], truth: Sequence[int]) -> float:
    """Share of the true triangles that are among those answered."""
    true = triangles_of(truth)
    return len(true & triangles_of(answers)) / len(true)


def tour_length(points: Points, answers: Sequence[int]) -> float:
    """Length of the closed tour; NaN where it does not visit every point once."""
    if sorted(answers) != list(range(len(points))):
        return float("nan")
    path = points[list(answers)]
    return float(np.linalg.norm(path - np.roll(path, -1, axis=0), axis=1).sum())


def length_ratio(points: Points, answers: Sequence[int], truth: Sequence[int]) -> float:
    """Length of the answered tour over that of the shortest; NaN where it is no tour."""
    return tour_length(points, answers) / tour_length(points, truth)


def _scores(name: str, points: Points, answers: list[int], truth: list[int]) -> tuple[bool, float]:
    """Whether an answer is right whatever its order may be, and its problem's own measure (NaN: not valid)."""
    if name == "sorting":
        return answers == truth, float("nan") if len(answers) != len(points) else float(np.mean(np.equal(answers, truth)))
    if name == "delaunay":
        return triangles_of(answers) == triangles_of(truth) and len(answers) == len(truth), triangle_coverage(answers, truth)
    turns = [truth[start:] + truth[:start] for start in range(len(truth))]
    if name == "convex_hull":
        return answers in turns, area_coverage(points, answers, truth)
    return answers in turns or answers[::-1] in turns, length_ratio(points, answers, truth)


MEASURES = {"sorting": "in_place", "convex_hull": "area", "delaunay": "coverage", "tsp": "length_ratio"}
"""Each problem's own measure of an answer."""


def decoded_scores(model: PointerNetwork, task: Pointing, split: Split = "valid", *, restrict: bool = True) -> dict[str, float]:
    """What the model's own sequences are worth, decoded greedily.

    Args:
        model: the pointer network.
        task: whose evaluation examples are decoded.
        split: "valid" or "test".
        restrict: let a point be answered once, and orders and tours end only when all are, as the paper does for tours.

    Returns:
        "exact": share of right answers (polygons and tours whatever their start, tours and triangulations whatever their order);
        "valid": share that has the problem's own measure; and the mean of this over valid answers: "area" (hull), "coverage"
        (triangulation), "length_ratio" (tour, from 1 up), "in_place" (sorting).
    """
    batch = task.examples(split).to(model.start.device)
    points = batch.context
    if points is None:
        raise ValueError("task: expected points as context, got none")
    problem = task.problem
    found = greedy_answers(
        model,
        points,
        task.num_steps,
        mask=batch.context_mask,
        once=restrict and problem.once,
        fixed_length=restrict and problem.fixed_length,
    )
    sizes = [task.num_points] * len(batch) if batch.context_mask is None else batch.context_mask.sum(1).tolist()
    places = points.double().cpu().numpy()
    rows = zip(places, sizes, answers_of(found), answers_of(batch.targets), strict=True)
    scores = [_scores(task.name, one[:size], answers, truth) for one, size, answers, truth in rows]
    values = np.array([value for _, value in scores])
    valid = np.isfinite(values)
    own = float(values[valid].mean()) if valid.any() else float("nan")
    return {"exact": float(np.mean([exact for exact, _ in scores])), "valid": float(valid.mean()), MEASURES[task.name]: own}
