"""What Pathfinder's images are made of, at the published sizes and at one for seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PathfinderSettings:
    """Parameters of the generator; lengths are in pixels, contours count segments.

    Args:
        size: side of the image.
        padding: width of the frame in which nothing is placed.
        margins: what stays free around segments; one is drawn for each image.
        segment_length: L.
        thickness: of the lines.
        antialias: how many times finer lines are drawn than the image is.
        seed_distance: between the first points of the two contours.
        marker_radius: of the discs that mark two ends.
        contour_length: segments of the two contours: 6, 9 and 14 are the published easy, intermediate and hard.
        continuity: how straight contours are.
        distractor_length: segments of a distractor.
        num_distractors: distractors.
        snake_contrasts: brightness of contours; two are drawn for each image. Distractors draw theirs for each segment.
        segment_contrasts: brightness of the contours' segments, a factor; one is drawn for each pair of segments.
        segment_retries: times that a segment may be drawn again.
        snake_retries: times that a distractor may be begun again.
    """

    size: int
    padding: int
    margins: tuple[int, ...]
    segment_length: int
    thickness: float
    antialias: int
    seed_distance: int
    marker_radius: float
    contour_length: int
    continuity: float
    distractor_length: int
    num_distractors: int
    snake_contrasts: tuple[float, ...]
    segment_contrasts: tuple[float, ...] = (1.0,)
    segment_retries: int = 2
    snake_retries: int = 4

    def __post_init__(self) -> None:
        whole = self.thickness * self.antialias
        if whole != round(whole) or whole < 1:
            raise ValueError(
                f"thickness: expected a positive multiple of 1 / antialias = {1 / self.antialias}, got {self.thickness}"
            )
        for name in ("size", "padding", "segment_length", "antialias", "seed_distance", "contour_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive integer, got {getattr(self, name)}")
        if 4 * self.seed_distance >= self.size:
            raise ValueError(f"seed_distance: expected less than a quarter of size={self.size}, got {self.seed_distance}")
        if min(self.margins, default=0) < 1 or not self.snake_contrasts or not self.segment_contrasts:
            raise ValueError("margins, snake_contrasts, segment_contrasts: expected at least one each, margins positive")


PATHFINDER: dict[int, PathfinderSettings] = {
    16: PathfinderSettings(16, 1, (1,), 2, 0.5, 2, 3, 1.5, 3, 1.0, 2, 0, (2.0,), (0.75,)),
    32: PathfinderSettings(32, 1, (1,), 2, 0.5, 2, 7, 1.5, 14, 1.0, 4, 5, (2.0,), (0.75,)),
    64: PathfinderSettings(64, 1, (1,), 5, 1.0, 2, 12, 2.5, 14, 1.8, 4, 5, (0.8,)),
    128: PathfinderSettings(128, 1, (2, 3), 5, 1.5, 2, 20, 3.0, 14, 1.8, 4, 8, (0.9,)),
    256: PathfinderSettings(256, 22, (3,), 5, 2.0, 2, 27, 5.0, 14, 1.8, 4, 7, (1.0,)),
}
"""The published parameters by side, 128 is Path-X, and our own for 16. Numbers of distractors are quotients cut to integers."""
