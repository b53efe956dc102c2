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


@dataclass(frozen=True)
class Promise:
    """What a mixer can promise.

    Args:
        made: whether a mixer with these flags makes it.
        form: the value of ``causal`` without which it has no meaning (a state is that of a causal mixer), or None.
    """

    made: Callable[[Supports], bool]
    form: bool | None = None


PROMISES = {
    "contract": Promise(lambda supports: True),  # what every mixer promises by being one
    "refusals": Promise(lambda supports: True),  # that what it does not promise, it does not do
    "causal": Promise(lambda supports: supports.causal != "no", form=True),
    "cross": Promise(lambda supports: supports.cross, form=False),
    "mask": Promise(lambda supports: supports.mask),
    "pair_mask": Promise(lambda supports: supports.pair_mask),
    "streaming": Promise(lambda supports: supports.streaming, form=True),
    "state": Promise(lambda supports: supports.state != "none", form=True),
    "associative": Promise(lambda supports: supports.associative, form=True),
    "dynamics": Promise(lambda supports: supports.dynamics, form=True),
    "grid": Promise(lambda supports: True),
    "mixing_matrix": Promise(lambda supports: supports.mixing_matrix),
    "permutation_equivariant": Promise(lambda supports: supports.permutation_equivariant, form=False),
    "batch_coupled": Promise(lambda supports: supports.batch_coupled),
    "discontinuous": Promise(lambda supports: supports.discontinuous),
    "varlen": Promise(lambda supports: supports.varlen),
    "cost": Promise(lambda supports: True),
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
        CHECKS[name] = Check(name, law, promise, first_line(function.__doc__), function, when or PROMISES[promise].made)
        return function

    return enter
