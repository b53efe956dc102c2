"""The exact generators of Long Range Arena."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from attnlab.tasks.lra.canvas import Canvas, free_cells
from attnlab.tasks.lra.contours import end_points, end_weights, opposite, translate
from attnlab.tasks.lra.drawing import Pen, dilate, disc, draw_disc, scale_grey
from attnlab.tasks.lra.listops_trees import (
    CLOSE,
    FIRST_DIGIT,
    FIRST_OPERATOR,
    UNKNOWN,
    ListOpsSettings,
    accepted_trees,
    draw_tree,
    read_source,
    source_text,
    value_of,
)
from attnlab.tasks.lra.pathfinder_images import PathfinderGenerator
from attnlab.tasks.lra.pathfinder_settings import PATHFINDER

SMALL = ListOpsSettings(4, 5, 5, 60)


def evaluate(ids):
    """The value of a tree, by a stack of its own."""
    stack = [[]]
    for token in ids:
        if FIRST_OPERATOR <= token < CLOSE:
            stack.append([token - FIRST_OPERATOR])
        elif token == CLOSE:
            operator, *values = stack.pop()
            median = int(statistics.median(values))
            stack[-1].append((min(values), max(values), median, sum(values) % 10)[operator])
        else:
            stack[-1].append(token - FIRST_DIGIT)
    (value,) = stack.pop()
    return value


def depth_of(ids):
    deepest = depth = 1
    for token in ids:
        depth += (FIRST_OPERATOR <= token < CLOSE) - (token == CLOSE)
        deepest = max(deepest, depth)
    return deepest


def test_trees_have_their_values_lengths_and_depths():
    for settings, count in ((SMALL, 60), (ListOpsSettings(), 1)):
        for ids, value in islice(accepted_trees(random.Random(3), settings), count):
            assert settings.min_length < len(ids) < settings.max_length
            assert value == evaluate(ids) and depth_of(ids) <= settings.max_depth
            assert read_source(source_text(ids)) == ids


def test_a_leaf_has_three_quarters_of_the_chance():
    rng = random.Random(0)
    leaves = sum(len(draw_tree(rng, SMALL)[0]) == 1 for _ in range(1000)) / 1000
    assert abs(leaves - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 1000)


def test_medians_are_cut_and_what_is_unknown_has_an_id():
    assert value_of(2, [3, 4]) == 3 and value_of(2, [9, 1, 5]) == 5 and value_of(3, [9, 9]) == 8
    assert read_source("( ( [FIRST 3 ) ] )") == [UNKNOWN, 4, CLOSE]


@pytest.mark.parametrize(
    "wrong", [{"max_depth": 0}, {"max_args": 1}, {"min_length": 60}, {"min_length": 10**9, "max_length": 2 * 10**9}]
)
def test_settings_without_trees_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected"):
        replace(SMALL, **wrong)


def test_steps_and_turns():
    assert translate((5, 5), 0.0, 3) == (5, 8) and translate((5, 5), math.pi / 2, 3) == (8, 5)
    assert translate((0, 0), math.pi / 2, 3) == (3, 1)  # rounded up: the cosine is a little more than 0
    assert opposite(-1.0) == pytest.approx(math.pi - 1) and opposite(1.0) == pytest.approx(1 - math.pi)
    points, angles = end_points((0, 0), 3, 32)
    assert (points >= 0).all() and np.allclose(np.arctan2(points[:, 0], points[:, 1]), angles)
    weights = end_weights(angles, np.ones(len(angles)), 0.0, 1.0)
    assert weights is not None and weights.sum() == pytest.approx(1.0) and angles[weights.argmax()] == 0.0
    assert end_weights(angles, np.zeros(len(angles)), 0.0, 1.0) is None


def test_a_dilation_is_the_largest_value_within_reach():
    image = np.random.default_rng(0).random((9, 11))
    y, x = np.mgrid[:9, :11]
    expected = [[image[(y - i) ** 2 + (x - j) ** 2 <= 4].max() for j in range(11)] for i in range(9)]
    assert np.array_equal(dilate(image, 2), np.array(expected))
    assert disc(1).sum() == 5 and disc(2).sum() == 13


def test_the_dilated_mask_of_a_canvas_is_the_dilation_of_its_mask():
    pen = Pen(2, 0.5, 1, 2)
    canvas, rng = Canvas(16, pen, 1), np.random.default_rng(0)
    for _ in range(30):
        row, column = rng.integers(0, 16, 2).tolist()
        canvas.occupy(pen.stroke(float(rng.uniform(-3, 3))), (row, column))
    inside = slice(canvas.border, canvas.border + 16)
    assert np.array_equal(canvas.dilated[inside, inside], dilate(canvas.mask[inside, inside], 1))
    outside = canvas.mask.copy()
    outside[inside, inside] = 0.0
    assert not outside.any()


def test_free_cells_see_nothing_taken():
    taken = np.random.default_rng(0).random((12, 12)) > 0.9
    offsets = np.array([[0, 0], [1, 2], [-1, 0]])
    cells = {tuple(cell) for cell in free_cells(taken, offsets).tolist()}
    for row in range(12):
        for column in range(12):
            seen = [(row + dr, column + dc) for dr, dc in offsets.tolist()]
            clear = not any(taken[at] for at in seen if 0 <= at[0] < 12 and 0 <= at[1] < 12)
            assert clear == ((row, column) in cells)
    assert len(free_cells(taken, None)) == 0


def test_markers_and_levels():
    marker = draw_disc(16, (5, 8), 2.0, 2)
    assert marker.shape == (16, 16) and marker[5, 8] > 0.95 and marker[12, 12] == 0.0
    assert scale_grey(np.array([[1.0, 2.0], [3.0, 1.5]])).tolist() == [[0, 128], [255, 64]]
    assert scale_grey(np.zeros((2, 2))).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("size", [16, 32])
def test_images_follow_their_streams(size):
    generator = PathfinderGenerator(PATHFINDER[size])

    def some(seed):
        numbers, shuffler = np.random.RandomState(seed), random.Random(seed)
        return [generator.draw(numbers, shuffler) for _ in range(6)]

    first, again, other = some(1), some(1), some(2)
    assert all(np.array_equal(a, b) and x == y for (a, x), (b, y) in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))
    assert all(image.shape == (size, size) and image.min() == 0 and image.max() == 255 for image, _ in first)
    assert {label for _, label in first + other} == {0, 1}


def test_settings_that_cannot_be_drawn_are_refused():
    for wrong, message in (
        ({"thickness": 0.3}, "thickness: expected a positive multiple"),
        ({"seed_distance": 8}, "seed_distance: expected less than a quarter"),
        ({"contour_length": 0}, "contour_length: expected a positive integer"),
        ({"margins": ()}, "margins, snake_contrasts, segment_contrasts"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(PATHFINDER[32], **wrong)
