"""The canvas on which Pathfinder's contours grow: what is drawn, what is occupied, and what is too near to that."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from attnlab.tasks.lra.contours import Point
from attnlab.tasks.lra.drawing import Cut, Pen, Stroke, dilate

OCCUPIED = 0.3
"""Value of the mask above which no contour begins at a pixel."""
CROSSING = 1.8
"""Sum of two masks from which on segments cross."""

Layers = tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]


class Canvas:
    """Ink, mask, and the mask dilated by the margin, kept up to date stroke by stroke.

    The layers have a border that strokes may stand over; what lies there is no part of the image, and occupies nothing.

    Args:
        size: side of the image.
        pen: draws its segments.
        padding: width of the frame that is occupied from the start.
    """

    def __init__(self, size: int, pen: Pen, padding: int) -> None:
        self.size, self.pen = size, pen
        self.border = pen.half + pen.margin
        whole = size + 2 * self.border
        frame = np.ones((size, size))
        frame[padding:-padding, padding:-padding] = 0.0
        ink, mask, dilated = (np.zeros((whole, whole)) for _ in range(3))
        self._inside(mask)[:] = frame
        self._inside(dilated)[:] = dilate(frame, pen.margin)
        self._blank: Layers = ink, mask, dilated
        self.clear()

    def clear(self) -> None:
        """An empty canvas again."""
        self.ink, self.mask, self.dilated = (layer.copy() for layer in self._blank)

    @property
    def image(self) -> Float[np.ndarray, "s s"]:
        """What is drawn."""
        return self._inside(self.ink)

    @property
    def taken(self) -> Bool[np.ndarray, "s s"]:
        """Where no contour may begin."""
        return self._inside(self.mask) > OCCUPIED

    def holds(self, *points: Point) -> bool:
        """Whether all points are pixels of the image."""
        return all(0 <= row < self.size and 0 <= column < self.size for row, column in points)

    def free_at(self, points: Int[np.ndarray, "k 2"]) -> Float[np.ndarray, "k"]:
        """How free pixels are: 1 less the dilated mask."""
        return 1.0 - self.dilated[points[:, 0] + self.border, points[:, 1] + self.border]

    def draw(self, stroke: Stroke, start: Point, contrast: float) -> None:
        """Add the ink of a stroke, and nothing to the mask."""
        window = self.ink[self._window(start, self.pen.half)]
        np.maximum(window, stroke.ink * np.float32(contrast), out=window)

    def crosses(self, stroke: Stroke, start: Point) -> bool:
        """Whether a stroke would cross what is occupied."""
        window = self.mask[self._window(start, self.pen.half)]
        return bool((window + stroke.cut(self._cut(start))).max() >= CROSSING)

    def occupy(self, stroke: Stroke, start: Point) -> None:
        """Add a stroke to the mask."""
        cut = self._cut(start)
        for layer, half, added in (
            (self.mask, self.pen.half, stroke.cut(cut)),
            (self.dilated, self.border, stroke.reach(cut)),
        ):
            window = layer[self._window(start, half)]
            np.maximum(window, added, out=window)

    def save(self) -> Layers:
        """What `restore` brings back."""
        return self.ink.copy(), self.mask.copy(), self.dilated.copy()

    def restore(self, layers: Layers) -> None:
        """The canvas as it was."""
        self.ink, self.mask, self.dilated = layers

    def _inside(self, layer: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "s s"]:
        return layer[self.border : self.border + self.size, self.border : self.border + self.size]

    def _window(self, point: Point, half: int) -> tuple[slice, slice]:
        top, left = point[0] + self.border - half, point[1] + self.border - half
        return slice(top, top + 2 * half + 1), slice(left, left + 2 * half + 1)

    def _cut(self, start: Point) -> Cut:
        row, column = start
        half, last = self.pen.half, self.size - 1
        return max(0, half - row), max(0, half - column), max(0, row + half - last), max(0, column + half - last)


def free_cells(taken: Bool[np.ndarray, "s s"], offsets: Int[np.ndarray, "k 2"] | None) -> Int[np.ndarray, "n 2"]:
    """Pixels from which nothing taken lies at any of the ``offsets``, row by row; no pixel without offsets."""
    if offsets is None:
        return np.empty((0, 2), dtype=np.int64)
    size, reach = len(taken), int(np.abs(offsets).max(initial=0))
    wide = np.pad(taken, reach)
    blocked = np.zeros_like(taken)
    for row, column in (offsets + reach).tolist():
        blocked |= wide[row : row + size, column : column + size]
    return np.argwhere(~blocked)
