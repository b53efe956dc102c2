"""Random rules of gCOG and grids on which they have one answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnlab.tasks.gcog.rules import STATEMENTS, Grid, Rule, Selector

ENDINGS = (*STATEMENTS, "getcolor", "getshape", "go")
"""Operators that a rule may end in."""


@dataclass(frozen=True)
class Family:
    """Rules that may be drawn.

    Args:
        depths: one of them is the depth, odd.
        starts: operators that branch; a rule of depth 1 has one of ``endings``.
        endings: operators at the ends.
        held_out: pairs of shape and colour that ``withheld`` operators do not have.
        withheld: these operators; with ``only_held_out`` they have no other pair.
        only_held_out: see above.
    """

    depths: tuple[int, ...] = (1,)
    starts: tuple[str, ...] = STATEMENTS
    endings: tuple[str, ...] = ENDINGS
    held_out: frozenset[tuple[int, int]] = frozenset()
    withheld: tuple[str, ...] = ()
    only_held_out: bool = False

    def has(self, operator: str, pair: tuple[int, int]) -> bool:
        """Whether an operator may be about an object of this shape and colour."""
        if operator not in self.withheld:
            return True
        return (pair in self.held_out) == self.only_held_out


class _Taken:
    """Cells and pairs of shape and colour that a rule's objects have, and what its getters ask by."""

    def __init__(self, side: int, features: int, rng: np.random.Generator) -> None:
        self.rng = rng
        self.cells = [(row, column) for row, column in np.ndindex(side, side)]
        rng.shuffle(self.cells)
        self.pairs: set[tuple[int, int]] = set()
        self.shapes: set[int] = set()
        self.colours: set[int] = set()
        self.features = features

    def free(self) -> list[tuple[int, int]]:
        """Pairs that no object has and no getter could mistake for its own, in random order."""
        every = [(shape, colour) for shape in range(1, self.features + 1) for colour in range(1, self.features + 1)]
        left = [pair for pair in every if pair not in self.pairs and self.harmless(pair)]
        return [left[index] for index in self.rng.permutation(len(left))]

    def harmless(self, pair: tuple[int, int]) -> bool:
        return pair[0] not in self.shapes and pair[1] not in self.colours

    def object_for(self, operator: str, family: Family) -> Selector | None:
        """A selector of full description for a new object, or None where there is none left."""
        for shape, colour in self.free():
            unique = {
                "getcolor": all(shape != other for other, _ in self.pairs),
                "getshape": all(colour != other for _, other in self.pairs),
            }.get(operator, True)
            if unique and family.has(operator, (shape, colour)):
                self.pairs.add((shape, colour))
                if operator == "getcolor":
                    self.shapes.add(shape)
                if operator == "getshape":
                    self.colours.add(colour)
                return Selector(shape, colour, self.cells.pop())
        return None


def draw_example(family: Family, num_distractors: int, side: int, features: int, rng: np.random.Generator) -> tuple[Rule, Grid]:
    """A rule and a grid on which all that it asks for is there.

    An object that a rule asks the existence of is there half the time; parities follow from where the objects lie. Distractors
    have neither an object's shape and colour together nor what a getter asks by, so that there is one answer.

    Draw order: depth; then the order of cells; operators and objects of the rule from the top, the true branch first; shape,
    colour and cell of distractors; which objects are there. Rules for whose objects there is no room are drawn again.

    Args:
        family: rules that may be drawn.
        num_distractors: objects beside, fewer where there is no room.
        side: rows and columns.
        features: shapes and colours in use.
        rng: where the numbers come from.
    """
    while True:
        taken = _Taken(side, features, rng)
        depth = int(rng.choice(family.depths))
        built = _grow(family, depth, depth == 1, taken)
        if built is not None:
            return built[0], _place(built[1], taken, num_distractors, side)


Built = tuple[Rule, list[tuple[str, Selector]]]


def _grow(family: Family, depth: int, single: bool, taken: _Taken) -> Built | None:
    """A rule of ``depth`` and its objects, or None where there is no room."""
    rng = taken.rng
    operators = family.endings if depth == 1 else family.starts
    operator = str(rng.choice(operators))
    parity = operator.startswith(("sum", "product"))
    count = 1 + int(parity and not single and rng.random() < 0.5)
    full = [taken.object_for(operator, family) if taken.cells else None for _ in range(count)]
    if any(selector is None for selector in full):
        return None
    objects = [(operator, selector) for selector in full if selector is not None]
    asked = tuple(
        Selector(0 if operator == "getshape" else s.shape, 0 if operator == "getcolor" else s.colour, s.cell) for _, s in objects
    )
    if depth == 1:
        return Rule(operator, asked), objects
    branches = [_grow(family, depth - 2, False, taken) for _ in range(2)]
    if branches[0] is None or branches[1] is None:
        return None
    (then, first), (otherwise, second) = branches[0], branches[1]
    return Rule(operator, asked, then, otherwise), [*objects, *first, *second]


def _place(objects: Sequence[tuple[str, Selector]], taken: _Taken, num_distractors: int, side: int) -> Grid:
    grid = np.zeros((side, side, 2), dtype=np.int64)
    kinds = taken.free()
    for _ in range(min(num_distractors, len(taken.cells)) if kinds else 0):
        shape, colour = kinds[int(taken.rng.integers(len(kinds)))]
        grid[taken.cells.pop()] = colour, shape
    for operator, selector in objects:
        if selector.cell is not None and (operator != "exist" or taken.rng.random() < 0.5):
            grid[selector.cell] = selector.colour, selector.shape
    return grid
