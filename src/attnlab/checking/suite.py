"""The list of checks: one function each, entered by a decorator that says which law it proves and which promise selects it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attnlab.checking.bench import Bench
from attnlab.core.info import Supports, first_line

LAWS = {
    0: "types and construction",
    1: "padding",
    2: "empty rows",
    3: "causality",
    4: "streaming",
    5: "batch",
    6: "precision",
    7: "refusal, and flags that tell the truth",
    8: "bad input",
    9: "randomness",
}

PROMISES: dict[str, Callable[[Supports], bool]] = {
    "contract": lambda supports: True,  # what every mixer promises by being one
    "refusals": lambda supports: True,  # that what it does not promise, it does not do
    "causal": lambda supports: supports.causal != "no",
    "cross": lambda supports: supports.cross,
    "mask": lambda supports: supports.mask,
    "pair_mask": lambda supports: supports.pair_mask,
    "streaming": lambda supports: supports.streaming,
    "state": lambda supports: supports.state != "none",
    "grid": lambda supports: True,
    "mixing_matrix": lambda supports: supports.mixing_matrix,
    "permutation_equivariant": lambda supports: supports.permutation_equivariant,
    "batch_coupled": lambda supports: supports.batch_coupled,
    "varlen": lambda supports: supports.varlen,
    "cost": lambda supports: True,
}


@dataclass(frozen=True)
class Check:
    """One check of the suite.

    Args:
        name: as `attnlab.check(only=...)` takes it.
        law: number of the law that it proves, a key of `LAWS`.
        promise: the promise that it counts for, a key of `PROMISES`.
        summary: what it demands, in a line.
        run: proves it on a bench and returns what was looked at, or raises `Violation` or `NotApplicable`.
        applies: whether a mixer with these promises has to pass it.
    """

    name: str
    law: int
    promise: str
    summary: str
    run: Callable[[Bench], str]
    applies: Callable[[Supports], bool]


CHECKS: dict[str, Check] = {}


def conformance(
    law: int, promise: str, *, when: Callable[[Supports], bool] | None = None
) -> Callable[[Callable[[Bench], str]], Callable[[Bench], str]]:
    """Decorator that enters a function into the suite, under its own name; the docstring's first line is the demand.

    Args:
        law: the law that it proves.
        promise: the promise that it counts for.
        when: which mixers have to pass it; by default those that make ``promise``.
    """
    if law not in LAWS or promise not in PROMISES:
        raise ValueError(f"law, promise: expected keys of LAWS and PROMISES, got {law!r} and {promise!r}")

    def enter(function: Callable[[Bench], str]) -> Callable[[Bench], str]:
        name = function.__name__
        if name in CHECKS:
            raise ValueError(f"check {name!r} is in the suite already")
        CHECKS[name] = Check(name, law, promise, first_line(function.__doc__), function, when or PROMISES[promise])
        return function

    return enter
