"""ListOps: nested list operations, drawn from Python's random stream, with their values and both written forms."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

OPERATORS = ("MIN", "MAX", "MED", "SM")
"""Minimum, maximum, median cut to an integer, sum modulo 10; the order in which they are drawn."""
PAD, FIRST_DIGIT, FIRST_OPERATOR, CLOSE, UNKNOWN = 0, 1, 11, 15, 16
"""Ids: padding; the digits are 1 to 10, the operators 11 to 14, the closing bracket 15; 16 stands for anything else."""
VOCAB_SIZE = 17


@dataclass(frozen=True)
class ListOpsSettings:
    """What ListOps trees are like.

    Args:
        max_depth: depth at which there are only digits; the root is at 1.
        max_args: most arguments of an operator, at least 2.
        min_length: trees have more tokens.
        max_length: trees have fewer tokens.
    """

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500
    max_length: int = 2000

    def __post_init__(self) -> None:
        if not 1 <= self.max_depth <= 200 or self.max_args < 2:
            raise ValueError(f"max_depth, max_args: expected 1 to 200 and at least 2, got {self.max_depth} and {self.max_args}")
        most = self.max_args ** (self.max_depth - 1) + 2 * sum(self.max_args**k for k in range(self.max_depth - 1))
        least = 1 if self.max_depth == 1 else 4
        if self.min_length < 0 or self.max_length - self.min_length < 2 or self.min_length >= most or self.max_length <= least:
            raise ValueError(
                "min_length, max_length: expected lengths between them that trees of this depth have, "
                f"got {self.min_length} and {self.max_length}"
            )


def value_of(operator: int, values: Sequence[int]) -> int:
    """The value of the operator with this number, in the order of `OPERATORS`."""
    if operator == 0:
        return min(values)
    if operator == 1:
        return max(values)
    if operator == 3:
        return sum(values) % 10
    ranked, middle = sorted(values), len(values) // 2
    return ranked[middle] if len(values) % 2 else (ranked[middle - 1] + ranked[middle]) // 2


def draw_tree(rng: random.Random, settings: ListOpsSettings) -> tuple[list[int], int]:
    r"""One tree of any length: its ids, and the value of its root.

    A node at a depth below the maximum takes u = ``rng.random()``; for u > 1/4, and always at the maximum, it is a digit,
    ``rng.randrange(10)``. Otherwise it takes its number of arguments, ``rng.randint(2, max_args)``, then its arguments in
    order, and at last its operator, ``rng.randrange(4)``.
    """
    uniform, below = rng.random, rng.randrange
    ids: list[int] = []
    unfinished: list[tuple[int, int, list[int]]] = []  # place of the operator, number of arguments, values of those there are
    while True:
        if len(unfinished) + 1 < settings.max_depth and uniform() <= 0.25:
            unfinished.append((len(ids), 2 + below(settings.max_args - 1), []))
            ids.append(PAD)  # the operator is drawn after its arguments
            continue
        value = below(10)
        ids.append(FIRST_DIGIT + value)
        while unfinished:
            place, count, values = unfinished[-1]
            values.append(value)
            if len(values) < count:
                break
            unfinished.pop()
            operator = below(len(OPERATORS))
            ids[place] = FIRST_OPERATOR + operator
            ids.append(CLOSE)
            value = value_of(operator, values)
        else:
            return ids, value


def accepted_trees(rng: random.Random, settings: ListOpsSettings, patience: int = 200_000) -> Iterator[tuple[list[int], int]]:
    """Ids and values of the trees whose length is between the bounds, in the order in which they are drawn; repeats occur.

    Args:
        rng: the stream.
        settings: the bounds.
        patience: draws in a row that may be of other lengths.

    Raises:
        ValueError: if more are.
    """
    rejected = 0
    while rejected <= patience:
        ids, value = draw_tree(rng, settings)
        rejected += 1
        if settings.min_length < len(ids) < settings.max_length:
            rejected = 0
            yield ids, value
    raise ValueError(
        f"min_length, max_length: expected lengths that trees have, got {settings.min_length} and {settings.max_length}, "
        f"and none between them in {patience} draws"
    )


def source_text(ids: Sequence[int]) -> str:
    """The tree in the published files' form: binary, nested to the left, ``( ( ( [MAX 4 ) 8 ) ] )``."""
    stack: list[list[str]] = [[]]
    for token in ids:
        if FIRST_OPERATOR <= token < CLOSE:
            stack.append([f"[{OPERATORS[token - FIRST_OPERATOR]}"])
        elif token == CLOSE:
            first, *rest = stack.pop()
            nested = "".join(f" {part} )" for part in (*rest, "]"))
            stack[-1].append("( " * (len(rest) + 1) + first + nested)
        else:
            stack[-1].append(str(token - FIRST_DIGIT))
    return stack[0][0]


_IDS = {
    **{str(digit): FIRST_DIGIT + digit for digit in range(10)},
    **{f"[{name}": FIRST_OPERATOR + number for number, name in enumerate(OPERATORS)},
    "]": CLOSE,
}


def read_source(text: str) -> list[int]:
    """Ids of a tree in the published files' form; parentheses are dropped, what is unknown gets the id for that."""
    return [_IDS.get(symbol, UNKNOWN) for symbol in text.split() if symbol not in "()"]
