"""Drawing of Pathfinder's segments and markers: at a multiple of the resolution, then scaled down with Lanczos' filter."""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from attnlab.tasks.lra.contours import Point


def pillow(module: str = "PIL.Image") -> ModuleType:
    """A module of Pillow, which draws the images and reads image files.

    Raises:
        ImportError: if it is not installed; says how it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            'images are drawn and read with Pillow, which is not installed: pip install "attnlab[images]"'
        ) from error


def disc(radius: int) -> Float[np.ndarray, "d d"]:
    """1 where $x^2 + y^2 \\le r^2$ on the pixels of a square of side 2 r + 1, else 0."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (x**2 + y**2 <= radius**2).astype(np.float64)


def dilate(image: Float[np.ndarray, "h w"], radius: int) -> Float[np.ndarray, "h w"]:
    """The largest value within ``radius`` of each pixel; nothing is outside."""
    from scipy.ndimage import grey_dilation

    return grey_dilation(image, footprint=disc(radius).astype(bool), mode="constant", cval=-np.inf)


def shrink(image: UInt8[np.ndarray, "h w"], height: int, width: int) -> UInt8[np.ndarray, "{height} {width}"]:
    """``image`` scaled with Lanczos' filter, in whole grey levels."""
    library = pillow()
    return np.asarray(library.fromarray(image).resize((width, height), library.Resampling.LANCZOS))


Cut = tuple[int, int, int, int]
"""Rows and columns of a stroke that lie over the upper, left, lower and right edge of the canvas."""


class Stroke:
    """A drawn segment around the point it starts from.

    Args:
        ink: how bright it is at contrast 1, a square with the start in the middle.
        mask: what it occupies, likewise.
        margin: what stays free around the mask.
    """

    def __init__(self, ink: Float[np.ndarray, "s s"], mask: Float[np.ndarray, "s s"], margin: int) -> None:
        self.ink, self.margin = ink, margin
        self._masks = {(0, 0, 0, 0): mask}
        self._reaches: dict[Cut, Float[np.ndarray, "r r"]] = {}

    @property
    def mask(self) -> Float[np.ndarray, "s s"]:
        """All that it occupies."""
        return self._masks[0, 0, 0, 0]

    def cut(self, cut: Cut) -> Float[np.ndarray, "s s"]:
        """The mask, 0 where it lies over the edge."""
        if cut not in self._masks:
            mask = np.zeros_like(self.mask)
            inside = slice(cut[0], len(mask) - cut[2]), slice(cut[1], len(mask) - cut[3])
            mask[inside] = self.mask[inside]
            self._masks[cut] = mask
        return self._masks[cut]

    def reach(self, cut: Cut) -> Float[np.ndarray, "r r"]:
        """The same with the margin around it, larger by that on every side."""
        if cut not in self._reaches:
            self._reaches[cut] = dilate(np.pad(self.cut(cut), self.margin), self.margin)
        return self._reaches[cut]


class Pen:
    """Draws segments of one length, thickness and margin; each direction on the pixel grid is drawn once.

    Args:
        length: L, in pixels.
        thickness: t; a whole number of pixels at the drawing's resolution.
        margin: m, what stays free on every side of a segment.
        antialias: how many times finer the drawing's resolution is.
    """

    def __init__(self, length: int, thickness: float, margin: int, antialias: int) -> None:
        self.length, self.thickness, self.margin, self.antialias = length, thickness, margin, antialias
        self.half = length + math.ceil(thickness) + margin
        """Pixels from the middle of a stroke to its edge."""
        self._strokes: dict[Point, Stroke] = {}
        self._kernels: dict[Point, Int[np.ndarray, "k 2"] | None] = {}

    def direction(self, angle: float) -> Point:
        """What decides how a segment at ``angle`` looks: its end on the fine grid, relative to its start."""
        centre, distance = self.half * self.antialias, float(self.length * self.antialias)
        # added to the centre before it is rounded up: next to an integer the sum's own rounding decides
        return (
            math.ceil(centre + distance * float(np.sin(angle))) - centre,
            math.ceil(centre + distance * float(np.cos(angle))) - centre,
        )

    def stroke(self, angle: float) -> Stroke:
        """The segment at ``angle``."""
        direction = self.direction(angle)
        if direction not in self._strokes:
            self._strokes[direction] = self._draw(direction)
        return self._strokes[direction]

    def kernel(self, angle: float) -> Int[np.ndarray, "k 2"] | None:
        """Offsets (row, column) from a segment's head at which its mask is full, within L + m of the head.

        None where these leave a corner of the canvas without any of them inside: the dilation by the segment has no value
        there, and the published generator then finds no free pixel at all.
        """
        direction = self.direction(angle)
        if direction not in self._kernels:
            self._kernels[direction] = self._kernel(self.stroke(angle).mask)
        return self._kernels[direction]

    def _kernel(self, mask: Float[np.ndarray, "s s"]) -> Int[np.ndarray, "k 2"] | None:
        reach = self.length + self.margin
        # the stroke starts one pixel after the middle of a square of side 2 (L + m) + 1
        offsets = np.argwhere(mask >= 1.0) - self.half + 1
        offsets = offsets[(np.abs(offsets) <= reach).all(1)]
        corners = [((offsets * signs) >= 0).all(1).any() for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
        return offsets if all(corners) else None

    def _draw(self, direction: Point) -> Stroke:
        library, draw = pillow(), pillow("PIL.ImageDraw")
        centre, fine = self.half * self.antialias, 2 * self.half * self.antialias + 1
        image = library.new("F", (fine, fine), 0)
        end = (centre + direction[1], centre + direction[0])
        width = round(self.thickness * self.antialias)
        draw.Draw(image).line([(centre, centre), end], fill=255, width=width)
        line = np.asarray(image, dtype=np.float64)
        side = 2 * self.half + 1
        thick = dilate(line, self.margin * self.antialias)
        # grey levels are in single precision, as the published images were
        ink, mask = (shrink(layer.astype(np.uint8), side, side).astype(np.float32) / np.float32(255) for layer in (line, thick))
        return Stroke(ink, mask.astype(np.float64), self.margin)


def draw_disc(size: int, centre: Point, radius: float, antialias: int) -> Float[np.ndarray, "{size} {size}"]:
    """A disc on an empty canvas of side ``size``, from 0 to 1."""
    y, x = np.ogrid[0 : size * antialias, 0 : size * antialias]
    inside: Bool[np.ndarray, "n n"] = (y - centre[0] * antialias) ** 2 + (x - centre[1] * antialias) ** 2 <= (
        radius * antialias
    ) ** 2
    return shrink(inside.astype(np.uint8) * np.uint8(255), size, size) / 255.0


def scale_grey(image: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Smallest to largest value as 0 to 255, rounded half up."""
    low, high = float(image.min()), float(image.max())
    scale = 255.0 / ((high - low) or 1.0)
    return ((image - low) * scale + 0.5).clip(0, 255).astype(np.uint8)
