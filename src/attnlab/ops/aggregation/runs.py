"""Which cells of an axis stand in a window's places: as slices, so that a neighbourhood is read through views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from attnlab.ops.neighborhoods import Axis

BORDERS = ("zero", "shifted")


class Run(NamedTuple):
    """Queries of an axis and what they read in one go.

    Args:
        queries: the queries.
        cells: where ``place`` is a number, the cell of each query, as many as queries; otherwise the cells of the whole window,
            which all these queries share.
        place: the window's place that is read, or None for all of them.
    """

    queries: slice
    cells: slice
    place: int | None


class Window(NamedTuple):
    """The rule of one axis of ``size`` cells: every ``stride``-th cell is a query and reads ``width`` cells around it.

    Args:
        size: cells along the axis.
        width: cells that a query reads, in steps of ``dilation``; an even window has one more before the query than after it.
        stride: distance of the queries, of which the first is cell 0.
        dilation: distance of the cells that a query reads.
        shifted: at borders the window moves inwards; otherwise its places beyond the axis hold no cell.
    """

    size: int
    width: int
    stride: int
    dilation: int
    shifted: bool

    @property
    def queries(self) -> int:
        """How many queries there are."""
        return -(-self.size // self.stride)

    def runs(self) -> Iterator[Run]:
        """Every pair of a query and a place that holds a cell, once."""
        return self._shifted() if self.shifted else self._cut()

    def _cut(self) -> Iterator[Run]:
        for place in range(self.width):
            offset = (place - self.width // 2) * self.dilation
            first = max(0, -(offset // self.stride))
            stop = min(self.queries, (self.size - 1 - offset) // self.stride + 1)
            if first < stop:
                begin = first * self.stride + offset
                yield Run(slice(first, stop), _every(begin, stop - first, self.stride), place)

    def _shifted(self) -> Iterator[Run]:
        before, after = self.width // 2, (self.width - 1) // 2
        for cells in Axis(self.size, self.width, 1, self.dilation).groups():
            count, first, step = len(cells), int(cells[0]), self.dilation
            inner = count - self.width + 1
            window = _every(first, self.width, step)
            if inner == 1:
                yield Run(_every(first, count, step), window, None)
                continue
            if before:
                yield Run(_every(first, before, step), window, None)
            for place in range(self.width):
                yield Run(_every(first + before * step, inner, step), _every(first + place * step, inner, step), place)
            if after:
                last = first + (inner - 1) * step
                yield Run(_every(first + (count - after) * step, after, step), _every(last, self.width, step), None)


def _every(first: int, count: int, step: int) -> slice:
    """``count`` numbers from ``first`` on, ``step`` apart."""
    return slice(first, first + (count - 1) * step + 1, step)


def windows_of(
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    border: str = "zero",
) -> tuple[Window, ...]:
    """The rules of all axes; a single value is that of every axis.

    Raises:
        ValueError: for another number of values than axes, a value below 1, an unknown border, and where windows are shifted
            for a stride above 1 or a window that an axis does not hold.
    """
    if border not in BORDERS:
        raise ValueError(f"border: expected one of {BORDERS}, got {border!r}")
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"grid: expected one to three sides, got {tuple(grid)}")
    values = []
    for name, value in (("window", window), ("stride", stride), ("dilation", dilation)):
        each = (value,) * len(grid) if isinstance(value, int) else tuple(value)
        if len(each) != len(grid) or min(each) < 1:
            raise ValueError(f"{name}: expected one positive number, or one for each of {len(grid)} axes, got {value}")
        values.append(each)
    if border == "shifted":
        if max(values[1]) > 1:
            raise ValueError(f"stride: expected 1 where windows are shifted at borders, got {values[1]}")
        for side, width, step in zip(grid, values[0], values[2], strict=True):
            Axis(side, width, 1, step)
    widths, strides, dilations = values
    rules = zip(grid, widths, strides, dilations, strict=True)
    return tuple(Window(*rule, shifted=border == "shifted") for rule in rules)
