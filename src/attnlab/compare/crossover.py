"""The length from which a mechanism takes less time than softmax attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Where = Literal["always", "at", "never"]


@dataclass(frozen=True)
class Crossover:
    """From which length on a mechanism is faster than its baseline, as far as was measured.

    Args:
        where: "always" (at every measured length), "at" (from ``length`` on), or "never" (not at the longest measured one).
        length: tokens, where it is "at"; the shortest measured length for "always"; the longest for "never".
    """

    where: Where
    length: float

    @property
    def text(self) -> str:
        """As a table shows it."""
        if self.where == "at":
            return f"{round(self.length):,}"
        return f"≤ {round(self.length):,}" if self.where == "always" else f"> {round(self.length):,}"

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
