"""Intervals and paired tests that stay honest with two or three seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

BOOTSTRAP_FROM = 20
"""Values from which on an interval is a bootstrap's; below, Student's t, whose assumption few values cannot test anyway."""
CONFIDENCE = 0.95
Verdict = Literal["better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Interval:
    """A mean with a 95 % confidence interval; ``low`` and ``high`` are None where one value gives none."""

    mean: float
    low: float | None
    high: float | None
    count: int


def t_cdf(t: float, df: int) -> float:
    """Distribution function of Student's t with an integer number of degrees of freedom (Abramowitz and Stegun, 26.7.3-4)."""
    if df < 1:
        raise ValueError(f"df: expected a positive integer, got {df}")
    angle = math.atan2(t, math.sqrt(df))
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = (cosine, cosine) if df % 2 else (1.0, 1.0)
    for k in range(3 if df % 2 else 2, df - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if df == 1:
        return 0.5 + angle / math.pi
    inside = (angle + sine * total) * 2.0 / math.pi if df % 2 else sine * total
    return 0.5 + 0.5 * inside


def t_quantile(p: float, df: int) -> float:
    """The t below which a share ``p`` of Student's distribution lies, by bisection to the last digit."""
    if not 0.0 < p < 1.0:
        raise ValueError(f"p: expected a number between 0 and 1, got {p}")
    if p < 0.5:
        return -t_quantile(1.0 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        low, high = high, 2.0 * high
    while high - low > 1e-14 * max(1.0, high):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return 0.5 * (low + high)


def mean_interval(values: Sequence[float], resolution: float = 0.0) -> Interval:
    """Mean and 95 % interval: Student's t below `BOOTSTRAP_FROM` values, a percentile bootstrap from there on.

    Args:
        values: one a seed.
        resolution: the step in which they come, such as one evaluation example: a few values that happen to be equal are still
            rounded, so their deviation is taken to be at least that of rounding, resolution / sqrt(12).

    Raises:
        ValueError: if there are no values.
    """
    if not values:
        raise ValueError("values: expected at least one, got none")
    data = np.asarray(values, dtype=np.float64)
    mean, count = float(data.mean()), len(data)
    if count == 1:
        return Interval(mean, None, None, 1)
    if count >= BOOTSTRAP_FROM:
        draws = np.random.default_rng(0).integers(count, size=(10_000, count))
        low, high = np.quantile(data[draws].mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Interval(mean, float(low), float(high), count)
    deviation = max(float(data.std(ddof=1)), resolution / math.sqrt(12))
    half = t_quantile((1 + CONFIDENCE) / 2, count - 1) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


@dataclass(frozen=True)
class Paired:
    """A paired comparison of a with b: the mean difference a - b, its interval, and the two-sided p value."""

    difference: Interval
    p: float | None

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves 0 out, else 0: a is larger, smaller, or nothing can be told."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            return 0
        return (low > 0) - (high < 0)


def paired_test(a: Sequence[float], b: Sequence[float], resolution: float = 0.0) -> Paired:
    """Student's paired t test; its interval is that of `mean_interval` over the differences.

    With equal differences of values without a ``resolution`` the p value is 0 if they are not 0, and 1 if they are.

    Raises:
        ValueError: if they are not of one length, or empty.
    """
    if len(a) != len(b):
        raise ValueError(f"a, b: expected as many values in both, got {len(a)} and {len(b)}")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    step = resolution * math.sqrt(2)  # a difference of two rounded values is rounded twice
    interval, count = mean_interval(differences, step), len(differences)
    if count < 2:
        return Paired(interval, None)
    spread = max(float(np.std(differences, ddof=1)), step / math.sqrt(12)) / math.sqrt(count)
    if spread == 0.0:
        return Paired(interval, 1.0 if interval.mean == 0.0 else 0.0)
    return Paired(interval, 2.0 * t_cdf(-abs(interval.mean / spread), count - 1))


def sign_flip_p(differences: Sequence[float], draws: int = 100_000) -> float:
    """Two-sided p value that paired differences have mean 0, by flipping signs: no assumption on their spread.

    Args:
        differences: up to 16 of them are flipped in every possible way, more in ``draws`` random ways.
        draws: for more than 16.

    Raises:
        ValueError: if there are none.
    """
    if not differences:
        raise ValueError("differences: expected at least one, got none")
    data = np.asarray(differences, dtype=np.float64)
    if len(data) <= 16:
        bits = np.arange(2 ** len(data))[:, None] >> np.arange(len(data)) & 1
    else:
        bits = np.random.default_rng(0).integers(2, size=(draws, len(data)))
        bits[0] = 1  # what was observed is one of the ways
    totals = np.abs(((2 * bits - 1) * data).sum(axis=1))
    return float((totals >= abs(data.sum()) * (1 - 1e-12)).mean())


@dataclass(frozen=True)
class Rank:
    """A mechanism among others on one task.

    Args:
        position: its place by mean alone, from 1.
        best: the best place that the paired tests leave open: one more than the number that is significantly better.
        worst: the worst place that they leave open.
    """

    position: int
    best: int
    worst: int

    @property
    def text(self) -> str:
        """``"2"``, or ``"1–4"`` where the tests cannot tell."""
        return str(self.best) if self.best == self.worst else f"{self.best}–{self.worst}"


def rank(values: Mapping[str, Mapping[int, float]], *, higher_is_better: bool, resolution: float = 0.0) -> dict[str, Rank]:
    """Ranks by paired tests over seeds.

    Args:
        values: for each name the value of each seed.
        higher_is_better: direction of the metric.
        resolution: its step, as `mean_interval` takes it.
    """
    sign = 1 if higher_is_better else -1
    order = sorted(values, key=lambda name: -sign * float(np.mean(list(values[name].values()))))
    ranks = {}
    for name in order:
        others = [values[other] for other in order if other != name]
        verdicts = [verdict(values[name], b, higher_is_better=higher_is_better, resolution=resolution) for b in others]
        best, worst = 1 + verdicts.count("worse"), len(order) - verdicts.count("better")
        ranks[name] = Rank(order.index(name) + 1, best, worst)
    return ranks


def verdict(a: Mapping[int, float], b: Mapping[int, float], *, higher_is_better: bool, resolution: float = 0.0) -> Verdict:
    """Whether a is better or worse than b, by the paired test over the seeds that both have."""
    seeds = sorted(set(a) & set(b))
    if not seeds:
        return "cannot tell"
    found = paired_test([a[seed] for seed in seeds], [b[seed] for seed in seeds], resolution)
    sign = found.sign * (1 if higher_is_better else -1)
    return "better" if sign > 0 else "worse" if sign < 0 else "cannot tell"


def pooled_deviation(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within groups, pooled, and its degrees of freedom; (0, 0) if no group has two values."""
    squares = sum(float(((np.asarray(g) - np.mean(g)) ** 2).sum()) for g in groups if len(g) > 1)
    df = sum(len(g) - 1 for g in groups if len(g) > 1)
    return (math.sqrt(squares / df), df) if df else (0.0, 0)
