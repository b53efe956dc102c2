"""Pathfinder's images: two contours, distractors, and two marked ends that lie on one contour or on two."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int, UInt8

from attnlab.tasks.lra.canvas import Canvas, free_cells
from attnlab.tasks.lra.contours import Point, end_points, end_weights, opposite, translate
from attnlab.tasks.lra.drawing import Pen, Stroke, draw_disc, scale_grey
from attnlab.tasks.lra.pathfinder_settings import PathfinderSettings

FULL = 0.01
"""Share of free pixels below which no distractor is begun."""


_T = TypeVar("_T")
_Cells = Int[np.ndarray, "k 2"]


@dataclass
class _Snake:
    """A growing contour; its last segment joins the mask only once the next one was placed."""

    origin: Point
    tip: Point
    pivot: Point
    angle: float
    last: tuple[Stroke, Point]


class PathfinderGenerator:
    r"""Draws Pathfinder images (Linsley et al. 2018; Tay et al. 2020), the published ones from the published streams.

    What an image takes from the streams, in this order: label; margin; then, until both contours are complete, a shuffle of
    the contrasts (from ``shuffler``), angle and tail of the first segment of one (again where its head or pivot is outside),
    angle and direction of the other's, and for each further segment a contrast and, contour by contour, a uniform number a
    try; then for each distractor contrast, angle and tail, and for each of its further segments a contrast and a uniform
    number a try; at last the contour whose beginning is marked. Integers are those of ``RandomState.randint``.

    Args:
        settings: what images are made of.
    """

    def __init__(self, settings: PathfinderSettings) -> None:
        self.settings = settings
        length, thickness, fine = settings.segment_length, settings.thickness, settings.antialias
        self._canvases = {
            margin: Canvas(settings.size, Pen(length, thickness, margin, fine), settings.padding) for margin in settings.margins
        }
        self._edge = _frame(settings.size, 1)
        self._far = _frame(settings.size, 2 * settings.seed_distance)  # two contours need room on all sides
        self._tails: dict[tuple[int, Point], Int[np.ndarray, "k 2"]] = {}

    def draw(self, numbers: np.random.RandomState, shuffler: random.Random) -> tuple[UInt8[np.ndarray, "s s"], int]:
        """One image, and its label: 1 if both markers are on one contour."""
        settings = self.settings
        label = int(numbers.randint(0, 2))
        canvas = self._canvases[self._choose(settings.margins, numbers)]
        canvas.clear()
        snakes = None
        while snakes is None:
            snakes = self._two_contours(canvas, numbers, shuffler)
        for _ in range(settings.num_distractors):
            self._distractor(canvas, numbers)
        marked = int(numbers.randint(0, 2))
        image = canvas.image
        for end in (snakes[marked].origin, snakes[marked if label else 1 - marked].tip):
            image = np.maximum(image, draw_disc(settings.size, end, settings.marker_radius, settings.antialias))
        return scale_grey(image), label

    def _two_contours(
        self, canvas: Canvas, numbers: np.random.RandomState, shuffler: random.Random
    ) -> tuple[_Snake, _Snake] | None:
        """Both contours, or None if one of them finds no way."""
        settings = self.settings
        contrasts = list(settings.snake_contrasts) * 2
        shuffler.shuffle(contrasts)
        factor = self._choose(settings.segment_contrasts, numbers)
        first = self._begin(canvas, numbers, factor * contrasts[0], self._central_tails)
        if first is None:
            return None
        factor = self._choose(settings.segment_contrasts, numbers)
        second = self._begin_beside(canvas, numbers, factor * contrasts[1], first.origin)
        if second is None or not self._extend_both(canvas, numbers, (first, second), contrasts):
            canvas.clear()
            return None
        canvas.occupy(*second.last)  # the published generator leaves out the first contour's last segment
        return first, second

    def _extend_both(
        self, canvas: Canvas, numbers: np.random.RandomState, snakes: tuple[_Snake, _Snake], contrasts: list[float]
    ) -> bool:
        for _ in range(self.settings.contour_length - 1):
            factor = self._choose(self.settings.segment_contrasts, numbers)
            for snake, contrast in zip(snakes, contrasts, strict=False):
                if not self._extend(canvas, snake, numbers, factor * contrast):
                    return False
        return True

    def _distractor(self, canvas: Canvas, numbers: np.random.RandomState) -> None:
        """A contour on the canvas as it is, with its retries; none if all of them fail."""
        for _ in range(self.settings.snake_retries + 1):
            before = canvas.save()
            snake = self._short_contour(canvas, numbers)
            if snake is not None:
                canvas.occupy(*snake.last)
                return
            canvas.restore(before)

    def _short_contour(self, canvas: Canvas, numbers: np.random.RandomState) -> _Snake | None:
        contrasts = self.settings.snake_contrasts
        contrast = self._choose(contrasts, numbers)
        snake = self._begin(canvas, numbers, contrast, self._free_tails)
        for _ in range(self.settings.distractor_length - 1):
            if snake is None:
                return None
            contrast = self._choose(contrasts, numbers)
            if not self._extend(canvas, snake, numbers, contrast):
                return None
        return snake

    def _begin(
        self, canvas: Canvas, numbers: np.random.RandomState, contrast: float, tails: Callable[[Canvas, float], _Cells]
    ) -> _Snake | None:
        """The first segment of a contour, from one of the ``tails`` that an angle leaves."""
        for _ in range(self.settings.segment_retries + 1):
            angle = self._angle(numbers)
            cells = tails(canvas, angle)
            if not len(cells):
                return None
            row, column = cells[numbers.randint(0, len(cells))].tolist()
            snake = self._first_segment(canvas, (row, column), angle, contrast)
            if snake is not None:
                return snake
        return None

    def _central_tails(self, canvas: Canvas, angle: float) -> _Cells:
        """Pixels from which a segment stays clear of the frame that leaves room for the other contour."""
        key = canvas.pen.margin, canvas.pen.direction(angle)
        if key not in self._tails:
            self._tails[key] = free_cells(self._far, canvas.pen.kernel(angle))
        return self._tails[key]

    def _free_tails(self, canvas: Canvas, angle: float) -> _Cells:
        """Pixels from which a segment stays clear of all that is occupied; none once hardly a pixel is free."""
        taken = canvas.taken
        kernel = None if 1.0 - taken.mean() < FULL else canvas.pen.kernel(angle)
        return free_cells(taken | self._edge, kernel)

    def _begin_beside(self, canvas: Canvas, numbers: np.random.RandomState, contrast: float, other: Point) -> _Snake | None:
        """The first segment of the second contour, at the seed distance from the first point of the ``other``."""
        distance = self.settings.seed_distance
        for _ in range(self.settings.segment_retries + 1):
            angle = self._angle(numbers)
            direction = int(numbers.randint(0, 360)) * math.pi / 180
            tail = (round(other[0] + distance * math.sin(direction)), round(other[1] + distance * math.cos(direction)))
            snake = self._first_segment(canvas, tail, angle, contrast)
            if snake is not None:
                return snake
        return None

    @staticmethod
    def _first_segment(canvas: Canvas, tail: Point, angle: float, contrast: float) -> _Snake | None:
        """Draw it, unless its head or its pivot lie outside."""
        pen = canvas.pen
        head = translate(tail, angle, pen.length)
        back = angle + math.pi if angle + math.pi < math.pi else angle - math.pi
        pivot = translate(head, back, pen.length + pen.margin)
        if not canvas.holds(head, pivot):
            return None
        stroke = pen.stroke(angle)
        canvas.draw(stroke, tail, contrast)
        return _Snake(tail, tail, pivot, angle, (stroke, tail))

    def _extend(self, canvas: Canvas, snake: _Snake, numbers: np.random.RandomState, contrast: float) -> bool:
        """One more segment; False if there is no way on."""
        settings, pen = self.settings, canvas.pen
        pivot = translate(snake.pivot, snake.angle, pen.length + 2 * pen.margin)
        points, angles = end_points(pivot, pen.length + pen.margin, canvas.size)
        weights = end_weights(angles, canvas.free_at(points), snake.angle, settings.continuity)
        if weights is None:
            return False
        edges = np.cumsum(weights)
        for _ in range(settings.segment_retries + 1):
            index = int(np.searchsorted(edges, numbers.rand(), side="right")) % len(edges)
            row, column = points[index].tolist()
            stroke = pen.stroke(opposite(angles[index]))
            if not canvas.crosses(stroke, (row, column)):
                canvas.draw(stroke, (row, column), contrast)
                canvas.occupy(*snake.last)
                snake.tip, snake.pivot, snake.angle = (row, column), pivot, float(angles[index])
                snake.last = (stroke, (row, column))
                return True
        return False

    @staticmethod
    def _angle(numbers: np.random.RandomState) -> float:
        return int(numbers.randint(-180, 180)) * np.pi / 180

    @staticmethod
    def _choose(values: tuple[_T, ...], numbers: np.random.RandomState) -> _T:
        return values[numbers.randint(0, len(values))]


def _frame(size: int, width: int) -> Bool[np.ndarray, "{size} {size}"]:
    """True on the outer ``width`` pixels."""
    frame = np.ones((size, size), dtype=bool)
    frame[width : size - width, width : size - width] = False
    return frame
