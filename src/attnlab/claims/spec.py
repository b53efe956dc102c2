"""Claims as data: what a paper says, how it is measured here, and which numbers decide; read from ``claims.toml``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from typing import Any

from attnlab.core.errors import UnknownNameError, nearest
from attnlab.papers.catalog import paper

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENDS = ("mean", "low", "high")


@dataclass(frozen=True)
class Condition:
    """A threshold on a measured number.

    Args:
        number: its name among those that the claim's runnable gives.
        at_least: the least it may be.
        at_most: the most it may be.
        of: what is compared: the mean, or the lower or upper end of its interval.
    """

    number: str
    at_least: float | int | None = None
    at_most: float | int | None = None
    of: str = "mean"

    def __post_init__(self) -> None:
        if self.of not in ENDS:
            raise ValueError(f"condition on {self.number!r}: of: expected one of {list(ENDS)}, got {self.of!r}")
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"condition on {self.number!r}: expected at_least or at_most, got neither")

    @property
    def text(self) -> str:
        """``"lower end of gap >= 0.05"``."""
        subject = {"mean": "", "low": "lower end of ", "high": "upper end of "}[self.of] + self.number
        bounds = ((">=", self.at_least), ("<=", self.at_most))
        return " and ".join(f"{subject} {sign} {bound}" for sign, bound in bounds if bound is not None)


@dataclass(frozen=True)
class Claim:
    """A statement of a paper that can be measured, or the reason why it cannot be here.

    Args:
        id: its name.
        paper: slug of the paper.
        statement: what the paper says, in our own words.
        published: the number that it prints.
        how: how it is measured here, and in what that differs from the paper.
        budget: what a run costs: tokens, steps, minutes on two cores.
        run: ``"module:function"`` in ``attnlab.claims``; empty if the claim is not testable here.
        settings: arguments of that function.
        number: the measured number that stands for the claim.
        reproduced: conditions that all hold if the claim is reproduced.
        partly: conditions that all hold if it is reproduced in part; none: there is no part.
        not_testable: why it cannot be measured here; empty if it can.
        pending: why there is no outcome yet; of no account once there is one.
    """

    id: str
    paper: str
    statement: str
    published: str
    how: str = ""
    budget: str = ""
    run: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    number: str = ""
    reproduced: tuple[Condition, ...] = ()
    partly: tuple[Condition, ...] = ()
    not_testable: str = ""
    pending: str = ""

    def __post_init__(self) -> None:
        paper(self.paper)
        if bool(self.run) == bool(self.not_testable):
            raise ValueError(f"claim {self.id!r}: expected either run or not_testable")
        if self.run and not (self.number and self.reproduced and self.how and self.budget):
            raise ValueError(f"claim {self.id!r}: expected how, budget, number and reproduced beside run")


@cache
def claims() -> dict[str, Claim]:
    """All claims of the package by their ids, in the order of the file."""
    return parse(tomllib.loads(files("attnlab.claims").joinpath("claims.toml").read_text(encoding="utf-8")))


def claim(name: str) -> Claim:
    """The claim with this id.

    Raises:
        UnknownNameError: there is none; names the nearest.
    """
    known = claims()
    if name not in known:
        hint = nearest(name, known) or f"; known: {', '.join(known)}"
        raise UnknownNameError(f"unknown claim {name!r}{hint}")
    return known[name]


def parse(document: Mapping[str, Any]) -> dict[str, Claim]:
    """The claims of a TOML document: tables ``claim``, and ``shared`` settings that they name.

    Raises:
        ValueError: a claim is incomplete, or its id is taken.
        UnknownNameError: for a key, a paper or shared settings that there are not.
    """
    found: dict[str, Claim] = {}
    for row in document["claim"]:
        made = _claim(row, document.get("shared", {}))
        if made.id in found:
            raise ValueError(f"claim {made.id!r} is there twice")
        found[made.id] = made
    return found


def _claim(row: Mapping[str, Any], shared: Mapping[str, Mapping[str, Any]]) -> Claim:
    name, known = row.get("id", "without id"), [f.name for f in fields(Claim)]
    for key in row:
        if key not in (*known, "shared"):
            raise UnknownNameError(f"claim {name!r}: unknown key {key!r}{nearest(key, known)}")
    common = row.get("shared")
    if common is not None and common not in shared:
        raise UnknownNameError(f"claim {name!r}: unknown shared settings {common!r}{nearest(common, shared)}")
    settings = {**(shared[common] if common is not None else {}), **row.get("settings", {})}
    conditions = {key: tuple(Condition(**c) for c in row.get(key, ())) for key in ("reproduced", "partly")}
    rest = {key: value for key, value in row.items() if key != "shared"}
    return Claim(**{**rest, "settings": settings, **conditions})
