"""Which mechanisms differ: paired tests corrected for their number, ranks, and how many seeds it would take to tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
from scipy import stats

from attnlab.compare.statistics import CONFIDENCE, Paired, paired_test

Verdict = Literal["better", "worse", "cannot tell"]
Seeds = Mapping[int, float]
"""The metric of each seed."""

POWER = 0.8
"""Probability with which a real difference should be found."""
MOST_SEEDS = 1000
"""Beyond as many, nobody will run them."""


@dataclass(frozen=True)
class Contrast:
    """One mechanism against another on one task.

    Args:
        paired: the paired test over the seeds that both have; None where they have none in common.
        p: its p value, corrected by Holm for all tests of its family; None with fewer than two seeds.
        verdict: of the first against the second, "cannot tell" unless the corrected p is below 5 %.
        seeds_needed: seeds at which the difference seen, with the spread seen, would be told with probability 0.8 by one test
            at 5 %; None where that is more than a thousand, or nothing was seen.
    """

    paired: Paired | None
    p: float | None
    verdict: Verdict
    seeds_needed: int | None


@dataclass(frozen=True)
class Rank:
    """A mechanism among others on one task.

    Args:
        position: its place by mean alone, from 1.
        best: the best place that the tests leave open: one more than the number that is significantly better.
        worst: the worst place that they leave open.
    """

    position: int
    best: int
    worst: int

    @property
    def text(self) -> str:
        """``"2"``, or ``"1–4"`` where the tests cannot tell."""
        return str(self.best) if self.best == self.worst else f"{self.best}–{self.worst}"


@dataclass(frozen=True)
class Question:
    """Two sets of seeds to be told apart, with the metric's direction and step (as `mean_interval` takes it)."""

    a: Seeds
    b: Seeds
    higher_is_better: bool
    resolution: float = 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): those below 5 % are all right together with probability 95 %.

    The i-th smallest of m is multiplied by m - i + 1, made no smaller than the one before it, and cut at 1.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, least = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        least = min(1.0, max(least, (len(p_values) - place) * p_values[i]))
        adjusted[i] = least
    return adjusted


def contrasts(questions: Sequence[Question]) -> list[Contrast]:
    """Answers to questions that are asked together, and are corrected together."""
    found = [_test(question) for question in questions]
    known = [i for i, paired in enumerate(found) if paired is not None and paired.p is not None]
    adjusted = dict(zip(known, holm([float(found[i].p or 0.0) for i in known]), strict=True))  # type: ignore[union-attr]
    out = []
    for i, (question, paired) in enumerate(zip(questions, found, strict=True)):
        p = adjusted.get(i)
        out.append(Contrast(paired, p, _verdict(question, paired, p), None if paired is None else seeds_needed(paired)))
    return out


def _test(question: Question) -> Paired | None:
    seeds = sorted(set(question.a) & set(question.b))
    if not seeds:
        return None
    return paired_test([question.a[s] for s in seeds], [question.b[s] for s in seeds], question.resolution)


def _verdict(question: Question, paired: Paired | None, p: float | None) -> Verdict:
    if paired is None or p is None or p >= 1.0 - CONFIDENCE:
        return "cannot tell"
    return "better" if (paired.difference.mean > 0) == question.higher_is_better else "worse"


def rank(values: Mapping[str, Seeds], *, higher_is_better: bool, resolution: float = 0.0) -> dict[str, Rank]:
    """Ranks by paired tests over seeds, corrected for all pairs of the task.

    Args:
        values: for each name the value of each seed.
        higher_is_better: direction of the metric.
        resolution: its step, as `attnlab.compare.statistics.mean_interval` takes it.
    """
    sign = 1 if higher_is_better else -1
    order = sorted(values, key=lambda name: -sign * float(np.mean(list(values[name].values()))))
    pairs = list(combinations(order, 2))
    found = contrasts([Question(values[a], values[b], higher_is_better, resolution) for a, b in pairs])
    ranks = {name: Rank(place, 1, len(order)) for place, name in enumerate(order, 1)}
    for (a, b), contrast in zip(pairs, found, strict=True):
        if contrast.verdict == "cannot tell":
            continue
        above, below = (a, b) if contrast.verdict == "better" else (b, a)
        ranks[above] = replace(ranks[above], worst=ranks[above].worst - 1)
        ranks[below] = replace(ranks[below], best=ranks[below].best + 1)
    return ranks


def power(difference: float, deviation: float, count: int) -> float:
    """Probability that a two-sided paired t test at 5 % over ``count`` seeds finds a difference with this deviation."""
    if count < 2:
        return 0.0
    if deviation == 0.0:
        return float(difference != 0.0)
    shift, limit = abs(difference) / deviation * math.sqrt(count), stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return float(stats.nct.sf(limit, count - 1, shift) + stats.nct.cdf(-limit, count - 1, shift))


def seeds_needed(paired: Paired) -> int | None:
    """Seeds at which a difference such as the one seen would be found with probability `POWER`; None beyond `MOST_SEEDS`."""
    deviation = paired.deviation
    if deviation is None or paired.difference.mean == 0.0:
        return None
    low, high = 1, 2
    while power(paired.difference.mean, deviation, high) < POWER:
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power(paired.difference.mean, deviation, middle) < POWER else (low, middle)
    return high if high <= MOST_SEEDS else None


def detectable(deviation: float, count: int) -> float | None:
    """The smallest difference that ``count`` seeds tell with probability `POWER`; None for fewer than two."""
    if count < 2:
        return None
    low, high = 0.0, 1.0
    while power(high, 1.0, count) < POWER:
        low, high = high, 2.0 * high
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if power(middle, 1.0, count) < POWER else (low, middle)
    return high * deviation


def typical_deviation(values: Iterable[Seeds]) -> float | None:
    """Median over pairs of the standard deviation of their differences over seeds; None without a pair of two seeds."""
    found = []
    for a, b in combinations(list(values), 2):
        seeds = sorted(set(a) & set(b))
        if len(seeds) > 1:
            found.append(float(np.std([a[s] - b[s] for s in seeds], ddof=1)))
    return float(np.median(found)) if found else None
