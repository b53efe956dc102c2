"""The length from which a mechanism takes less time than softmax attention."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

Where = Literal["always", "at", "never"]


@dataclass(frozen=True)
class Crossover:
    """From which length on a mechanism is faster than its baseline, as far as was measured.

    Args:
        where: "always" (at every measured length), "at" (from ``length`` on), or "never" (not at the longest measured one).
        length: tokens, where it is "at"; the shortest measured length for "always"; the longest for "never".
        low: where the lower ends of the ratios' intervals cross 1; None if no intervals are known, or at the shortest length.
        high: where the upper ends cross 1; None if no intervals are known, or not within the measured range.
    """

    where: Where
    length: float
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        """As a table shows it."""
        if self.where == "at":
            return f"{round(self.length):,}"
        return f"≤ {round(self.length):,}" if self.where == "always" else f"> {round(self.length):,}"

    @property
    def interval(self) -> str:
        """The 95 % interval in words, where it is known: ``"900–1,300"``, open where the measured range ends."""
        if self.where != "at" or (self.low is None and self.high is None):
            return ""
        low = "…" if self.low is None else f"{round(self.low):,}"
        return f"{low}–{'…' if self.high is None else f'{round(self.high):,}'}"

    @property
    def sentence(self) -> str:
        """As a sentence says it."""
        if self.where == "at":
            return f"faster than softmax attention from about {round(self.length):,} tokens on"
        if self.where == "always":
            return f"faster than softmax attention at every measured length, from {round(self.length):,} tokens on"
        return f"not faster than softmax attention within the measured range, up to {round(self.length):,} tokens"


def crossover(lengths: Sequence[int], ratios: Sequence[float]) -> Crossover:
    """Where the ratio of times falls below 1 for good.

    Between the last length at which the ratio is at least 1 and the next, log(ratio) is taken as linear in log(length).

    Args:
        lengths: tokens, rising.
        ratios: the mechanism's time over the baseline's, positive.

    Raises:
        ValueError: if there are none, they are not positive, or the lengths do not rise.
    """
    if not lengths or len(lengths) != len(ratios) or min([*lengths, *ratios]) <= 0:
        raise ValueError(f"lengths, ratios: expected as many positive numbers in both, got {list(lengths)} and {list(ratios)}")
    if any(b <= a for a, b in pairwise(lengths)):
        raise ValueError(f"lengths: expected rising numbers, got {list(lengths)}")
    slower = [i for i, ratio in enumerate(ratios) if ratio >= 1.0]
    if not slower:
        return Crossover("always", float(lengths[0]))
    last = slower[-1]
    if last == len(lengths) - 1:
        return Crossover("never", float(lengths[-1]))
    before, after = math.log(ratios[last]), math.log(ratios[last + 1])
    share = before / (before - after)
    log_length = math.log(lengths[last]) + share * (math.log(lengths[last + 1]) - math.log(lengths[last]))
    return Crossover("at", math.exp(log_length))


def with_interval(lengths: Sequence[int], ratios: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Crossover:
    """`crossover`, with the lengths at which the ends of the ratios' intervals cross 1.

    Args:
        lengths: tokens, rising.
        ratios: the mechanism's time over the baseline's.
        low: lower ends of their intervals.
        high: upper ends.
    """
    found = crossover(lengths, ratios)
    ends = [crossover(lengths, end) for end in (low, high)]
    first, last = (end.length if end.where == "at" else None for end in ends)
    return replace(found, low=first, high=last)


def growth(lengths: Sequence[int], seconds: Sequence[float], from_share: float = 0.125) -> float | None:
    r"""The exponent p of $t \propto n^p$ over the longer lengths, by least squares in logarithms.

    Args:
        lengths: tokens, rising.
        seconds: times, positive.
        from_share: lengths below this share of the longest are left out: fixed costs are no growth.

    Returns:
        None with fewer than two lengths.
    """
    kept = [(n, t) for n, t in zip(lengths, seconds, strict=True) if n >= from_share * max(lengths)]
    if len(kept) < 2:
        return None
    x, y = ([math.log(value) for value in values] for values in zip(*kept, strict=True))
    return statistics.linear_regression(x, y).slope
