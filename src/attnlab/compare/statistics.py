"""Intervals and paired tests that stay honest with two or three seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

BOOTSTRAP_FROM = 20
"""Values from which on an interval is a bootstrap's; below, Student's t, whose assumption few values cannot test anyway."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with a 95 % confidence interval; ``low`` and ``high`` are None where one value gives none."""

    mean: float
    low: float | None
    high: float | None
    count: int


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
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


@dataclass(frozen=True)
class Paired:
    """A paired comparison of a with b.

    Args:
        difference: mean and interval of a - b.
        p: two-sided; None with fewer than two values.
        deviation: of the differences, no less than that of rounding; None with fewer than two.
    """

    difference: Interval
    p: float | None
    deviation: float | None


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
        return Paired(interval, None, None)
    deviation = max(float(np.std(differences, ddof=1)), step / math.sqrt(12))
    if deviation == 0.0:
        return Paired(interval, 1.0 if interval.mean == 0.0 else 0.0, 0.0)
    spread = deviation / math.sqrt(count)
    return Paired(interval, 2.0 * float(stats.t.sf(abs(interval.mean / spread), count - 1)), deviation)


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


def pooled_deviation(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within groups, pooled, and its degrees of freedom; (0, 0) if no group has two values."""
    squares = sum(float(((np.asarray(g) - np.mean(g)) ** 2).sum()) for g in groups if len(g) > 1)
    df = sum(len(g) - 1 for g in groups if len(g) > 1)
    return (math.sqrt(squares / df), df) if df else (0.0, 0)
