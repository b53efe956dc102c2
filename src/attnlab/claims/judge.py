"""The verdict on a claim: what its thresholds say of the numbers measured, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from attnlab.claims.quantity import Quantity
from attnlab.claims.spec import Claim, Condition

Verdict = Literal["reproduced", "partly", "not", "not testable here"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "partly", "not", "not testable here")


def judge(claim: Claim, quantities: Mapping[str, Quantity]) -> Verdict:
    """What the claim's conditions make of these numbers; a claim that cannot be measured needs none.

    Raises:
        ValueError: a number that a condition reads, or the end of its interval, was not measured.
    """
    if claim.not_testable:
        return "not testable here"
    if all_hold(claim.reproduced, quantities):
        return "reproduced"
    return "partly" if claim.partly and all_hold(claim.partly, quantities) else "not"


def all_hold(conditions: Sequence[Condition], quantities: Mapping[str, Quantity]) -> bool:
    """Whether every condition holds."""
    each = [
        holds(condition, quantities) for condition in conditions
    ]  # all are read: a number that is missing is never passed over
    return all(each)


def holds(condition: Condition, quantities: Mapping[str, Quantity]) -> bool:
    """Whether a number is within its bounds, the bounds included."""
    quantity = quantities.get(condition.number)
    if quantity is None:
        raise ValueError(f"{condition.number}: expected a measured number, got only {sorted(quantities)}")
    value = {"mean": quantity.mean, "low": quantity.low, "high": quantity.high}[condition.of]
    if value is None:
        raise ValueError(f"{condition.text}: expected an interval, but {quantity.count} value gives none")
    above = condition.at_least is None or value >= condition.at_least
    return above and (condition.at_most is None or value <= condition.at_most)
