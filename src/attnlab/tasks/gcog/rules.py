"""Rules of gCOG: what they mean on a grid, and how both are written as tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

OPERATORS = ("exist", "go", "getcolor", "getshape", "sumeven", "producteven", "productodd", "sumodd", "switch")
"""In the order of their ids, from 1."""

STATEMENTS = ("exist", "sumeven", "producteven", "sumodd", "productodd")
"""Operators that answer True or False, by which a rule branches."""

NUM_SHAPES, NUM_COLOURS = 26, 10
"""Shapes are the letters a to z, colours red to brown; ids count from 1."""

Grid = Int[np.ndarray, "rows columns two"]
"""Colour and shape of the object in each cell, 0 where there is none."""


@dataclass(frozen=True)
class Selector:
    """Objects of a shape and a colour; 0 leaves either open. Of several that fit, the one in ``cell`` is meant."""

    shape: int = 0
    colour: int = 0
    cell: tuple[int, int] | None = None


@dataclass(frozen=True)
class Rule:
    """An operator on one or two kinds of object, and where it branches what comes next.

    Args:
        operator: one of `OPERATORS` but "switch".
        selectors: whom it is about.
        then: the rule to go on with where the statement is true, or None for an answer.
        otherwise: the one where it is false.

    Raises:
        ValueError: for an unknown operator, a branch after a question, or one branch of two.
    """

    operator: str
    selectors: tuple[Selector, ...]
    then: Rule | None = None
    otherwise: Rule | None = None

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS[:-1]:
            raise ValueError(f"operator: expected one of {OPERATORS[:-1]}, got {self.operator!r}")
        if (self.then is None) != (self.otherwise is None) or (self.then is not None and self.operator not in STATEMENTS):
            raise ValueError(f"then, otherwise: expected both or none, and none after a question such as {self.operator!r}")

    @property
    def depth(self) -> int:
        """Nodes on the longest way down, the branching itself being one."""
        parts = [part.depth for part in (self.then, self.otherwise) if part is not None]
        return 1 + (1 + max(parts) if parts else 0)

    def levels(self) -> Iterator[Rule | None]:
        """All rules from the top, level by level, with None for a branching after its statement."""
        waiting: deque[Rule | None] = deque([self])
        branching: deque[Rule] = deque()
        while waiting:
            rule = waiting.popleft()
            yield rule
            if rule is None:
                parent = branching.popleft()
                waiting.extend((parent.then, parent.otherwise))
            elif rule.then is not None:
                waiting.append(None)
                branching.append(rule)


def places(grid: Grid, selector: Selector) -> Int[np.ndarray, "k two"]:
    """Row and column of each object that a selector means."""
    found = grid.any(-1)
    for wanted, value in ((selector.colour, grid[..., 0]), (selector.shape, grid[..., 1])):
        if wanted:
            found = found & (value == wanted)
    return np.argwhere(found)


def num_classes(side: int = 10) -> int:
    """Answers: True, False, the cells, the shapes, the colours."""
    return 2 + side**2 + NUM_SHAPES + NUM_COLOURS


def holds(rule: Rule, grid: Grid) -> bool:
    """Whether a statement is true of a grid.

    Raises:
        ValueError: where a parity is asked of an object that is not there.
    """
    if rule.operator == "exist":
        return len(places(grid, rule.selectors[0])) > 0
    cells = np.array([_only(rule, grid, selector) for selector in rule.selectors])
    number = cells.sum() if rule.operator.startswith("sum") else cells.prod()
    return bool(number % 2 == (0 if rule.operator.endswith("even") else 1))


def evaluate(rule: Rule, grid: Grid) -> int:
    """The class of a rule's answer on a square grid.

    Classes are True, False, the cells column by column, the shapes and the colours.

    Raises:
        ValueError: where an object that must be there is not.
    """
    if rule.operator in STATEMENTS:
        truth = holds(rule, grid)
        branch = rule.then if truth else rule.otherwise
        return int(not truth) if branch is None else evaluate(branch, grid)
    row, column = _only(rule, grid, rule.selectors[0])
    side = len(grid)
    if rule.operator == "go":
        return 2 + side * column + row
    colour, shape = grid[row, column].tolist()
    return 2 + side**2 + (shape - 1 if rule.operator == "getshape" else NUM_SHAPES + colour - 1)


def encode_rule(rule: Rule) -> Float[np.ndarray, "n 8"]:
    """A row a node, level by level, and one that ends the rule.

    A row is the operator's id; shape, colour and time (1) of up to two selectors, 1 standing for what is left open; and 1 in the
    last row alone. The row of a branching has its id only.
    """
    rows = []
    for node in rule.levels():
        row = np.zeros(8)
        row[0] = OPERATORS.index("switch" if node is None else node.operator) + 1
        for index, selector in enumerate(() if node is None else node.selectors):
            row[1 + 3 * index : 4 + 3 * index] = selector.shape or 1, selector.colour or 1, 1
        rows.append(row)
    return np.array([*rows, [0.0] * 7 + [1.0]])


def encode_grid(grid: Grid) -> Int[np.ndarray, "n 3"]:
    """Colour and shape of each cell row by row, and a token that ends the grid."""
    cells = grid.reshape(-1, 2)
    return np.concatenate((np.pad(cells, ((0, 0), (0, 1))), [[0, 0, 1]]))


def _only(rule: Rule, grid: Grid, selector: Selector) -> tuple[int, int]:
    found = [(row, column) for row, column in places(grid, selector).tolist()]
    if len(found) > 1 and selector.cell in found:
        return selector.cell
    if len(found) != 1:
        raise ValueError(f"grid: expected one object for {rule.operator!r} of {selector}, got {len(found)}")
    return found[0]
