"""Pointing: the answers are exact and in their published order, and decoded sequences are scored as they should be."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from attnlab.core.errors import UnknownNameError
from attnlab.tasks import IGNORE, create_task, reference_model
from attnlab.tasks.pointing import decoded
from attnlab.tasks.pointing.problems import PROBLEMS, incentres
from attnlab.tasks.pointing.task import PUBLISHED, answers_of
from attnlab.tasks.pointing.tours import distances, shortest_tours
from attnlab.training import train


def solved(problem, count=30, **options):
    """Points in float64 and the answers of drawn examples."""
    task = create_task("pointing", problem=problem, **options)
    batch = task.draw(count, torch.Generator().manual_seed(0))
    return batch.context.double().numpy(), answers_of(batch.targets)


def left_of(a, b, c):
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def test_numbers_are_sorted():
    points, answers = solved("sorting", num_points=7)
    for numbers, order in zip(points[..., 0], answers, strict=True):
        assert numbers[order].tolist() == sorted(numbers.tolist())


def test_hulls_have_every_point_on_their_left_and_begin_with_the_first():
    points, answers = solved("convex_hull", num_points=9)
    for where, hull in zip(points, answers, strict=True):
        assert hull[0] == min(hull) and len(set(hull)) == len(hull)
        for a, b in zip(hull, hull[1:] + hull[:1], strict=True):
            assert all(left_of(where[a], where[b], where[c]) > 0 for c in range(9) if c not in (a, b))


def test_no_point_lies_in_the_circle_of_a_delaunay_triangle():
    points, answers = solved("delaunay", num_points=8)
    for where, order in zip(points, answers, strict=True):
        triples = [order[start : start + 3] for start in range(0, len(order), 3)]
        assert all(a < b < c for a, b, c in triples)
        for triple in triples:
            corners = where[triple]
            centre = np.linalg.solve(2 * (corners[1:] - corners[0]), np.square(corners[1:]).sum(1) - np.square(corners[0]).sum())
            radius = np.linalg.norm(corners[0] - centre)
            others = [c for c in range(8) if c not in triple]
            assert (np.linalg.norm(where[others] - centre, axis=1) > radius).all()
        centres = incentres(where, np.array(triples)).tolist()
        assert centres == sorted(centres)
        assert sum(abs(decoded.polygon_area(where[triple])) for triple in triples) == pytest.approx(hull_area(where))


def hull_area(where):
    (hull,) = PROBLEMS["convex_hull"].solve(where[None])
    return decoded.polygon_area(where[hull])


def test_an_incentre_is_as_far_from_every_side():
    corners = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
    np.testing.assert_allclose(incentres(corners, np.array([[0, 1, 2]])), [[1.0, 1.0]])


def test_tours_are_the_best_of_all():
    points = np.random.default_rng(0).random((4, 7, 2))
    tours = shortest_tours(points)
    for where, tour in zip(points, tours.tolist(), strict=True):
        between = distances(where[None])[0]
        lengths = {(0, *p): sum(between[a, b] for a, b in zip((0, *p), (*p, 0), strict=True)) for p in permutations(range(1, 7))}
        best = min(lengths, key=lengths.__getitem__)
        assert tour in (list(best), [0, *best[:0:-1]]) and tour[1] < tour[-1]
    assert shortest_tours(points[:, :2]).tolist() == [[0, 1]] * 4
    assert len(shortest_tours(np.random.default_rng(0).random((33, 3, 2)))) == 33


def test_batches_feed_the_answers_before_and_mask_what_is_not_there():
    task = create_task("pointing", problem="convex_hull", num_points=8, min_points=4)
    batch = task.draw(60, torch.Generator().manual_seed(0))
    asked = batch.targets != IGNORE
    assert torch.equal(batch.mask, asked) and batch.inputs.shape == batch.targets.shape == (60, 9)
    assert (batch.inputs[:, 0] == 0).all() and (batch.inputs[~asked] == 0).all()
    assert torch.equal(batch.inputs[:, 1:][asked[:, 1:]], batch.targets[:, :-1][asked[:, 1:]])
    sizes = batch.context_mask.sum(1)
    assert set(sizes.tolist()) == {4, 5, 6, 7, 8}
    assert (batch.targets.amax(1) <= sizes).all() and ((batch.targets == 0).sum(1) == 1).all()
    assert (batch.context[~batch.context_mask] == 0).all()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_answer_is_one_that_the_rules_allow(problem):
    task = create_task("pointing", problem=problem, num_points=7, min_points=4)
    batch = task.draw(50, torch.Generator().manual_seed(1))
    values = task.baselines()
    assert all(0 < value < 1 for value in values.values()) and values["rules"] > values["any_answer"]
    for row, size in zip(answers_of(batch.targets), batch.context_mask.sum(1).tolist(), strict=True):
        assert all(task.problem.choices(size, row[:step]) >= 1 for step in range(len(row) + 1))
        assert len(row) <= task.problem.most_answers(size)
        assert not task.problem.once or len(set(row)) == len(row)


def test_the_rules_count_what_is_possible():
    """All prefixes of answers over many draws: as many as the rules say, no more."""
    for problem in PROBLEMS:
        _, answers = solved(problem, count=3000, num_points=4)
        seen: dict[tuple[int, ...], set[int]] = {}
        for row in answers:
            for step in range(len(row) + 1):
                seen.setdefault(tuple(row[:step]), set()).add([*row, -1][step])
        assert all(len(next_) <= PROBLEMS[problem].choices(4, before) for before, next_ in seen.items())
        assert len(seen[()]) == PROBLEMS[problem].choices(4, ())


SQUARE = np.array([[0.0, 0.0], [1.0, 0.1], [1.1, 1.0], [0.05, 1.05], [0.5, 0.4]])


def test_hulls_are_scored_by_their_area():
    truth = [0, 1, 2, 3]
    assert decoded.area_coverage(SQUARE, [2, 3, 0, 1], truth) == 1.0
    assert decoded.area_coverage(SQUARE, [3, 2, 1, 0], truth) == 1.0
    assert 0 < decoded.area_coverage(SQUARE, [0, 1, 2], truth) < 1
    crossing, twice, few = [0, 2, 1, 3], [0, 1, 1, 2], [0, 1]
    assert all(np.isnan(decoded.area_coverage(SQUARE, answers, truth)) for answers in (crossing, twice, few))


def test_tours_and_triangles_are_scored():
    best = shortest_tours(SQUARE[None])[0].tolist()
    assert decoded.length_ratio(SQUARE, best[::-1], best) == pytest.approx(1.0)
    assert decoded.length_ratio(SQUARE, [0, 2, 1, 3, 4], best) > 1.0
    assert np.isnan(decoded.tour_length(SQUARE, [0, 1, 2, 3])) and np.isnan(decoded.tour_length(SQUARE, [0, 1, 2, 3, 3]))
    assert decoded.triangle_coverage([2, 0, 1, 0, 0, 4], [0, 1, 2, 0, 1, 4]) == 0.5
    assert decoded._scores("convex_hull", SQUARE, [1, 2, 3, 0], [0, 1, 2, 3])[0]
    assert not decoded._scores("convex_hull", SQUARE, [3, 2, 1, 0], [0, 1, 2, 3])[0]
    assert decoded._scores("tsp", SQUARE, best[::-1], best)[0]
    assert decoded._scores("sorting", SQUARE, [0, 1, 2, 4, 3], [0, 1, 2, 3, 4]) == (False, 0.6)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_restricted_sequences_of_an_untrained_model_are_valid_where_all_points_are_answered(problem):
    task = create_task("pointing", problem=problem, num_points=6, min_points=4, eval_examples=30)
    model = reference_model(task, "softmax", dim=8, depth=1).model
    scores = decoded.decoded_scores(model, task)
    assert set(scores) == {"exact", "valid", decoded.MEASURES[problem]}
    if task.problem.fixed_length:
        assert scores["valid"] == 1.0
    assert decoded.decoded_scores(model, task, restrict=False)["exact"] <= 1.0


def test_sorting_is_learnt_and_decoded():
    task = create_task("pointing", problem="sorting", num_points=4)
    model = reference_model(task, "softmax", dim=24, depth=1).model
    train(model, task, steps=150, batch_size=64, learning_rate=0.01, eval_split=None)
    scores = decoded.decoded_scores(model, task, "test")
    assert scores["valid"] == 1.0 and scores["exact"] > 0.8 and scores["in_place"] >= scores["exact"]


def test_published_settings_are_options():
    for options in PUBLISHED.values():
        assert create_task("pointing", **options).num_points <= 50


def test_bad_options():
    with pytest.raises(UnknownNameError, match="convex_hull"):
        create_task("pointing", problem="convex_hul")
    with pytest.raises(ValueError, match="expected 3 <= min_points <= num_points <= 13 for 'tsp', got 14 and None"):
        create_task("pointing", problem="tsp", num_points=14)
    with pytest.raises(ValueError, match="expected 2 <= min_points <= num_points for 'sorting', got 5 and 6"):
        create_task("pointing", problem="sorting", num_points=5, min_points=6)
    with pytest.raises(ValueError, match="expected 2 to 13 points"):
        shortest_tours(np.zeros((1, 14, 2)))
