"""Statistics against scipy, and honesty with few values."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from attnlab.compare import statistics as ours

DRAW = np.random.default_rng(3)


@pytest.mark.parametrize("count", [2, 3, 5, 19])
def test_mean_interval_equals_scipy(count):
    values = DRAW.normal(3.0, 2.0, count)
    low, high = scipy.stats.t.interval(0.95, count - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    found = ours.mean_interval(list(values))
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high), rel=1e-10)
    assert found.count == count


def test_many_values_are_bootstrapped():
    values = DRAW.exponential(1.0, 60)
    found = ours.mean_interval(list(values))
    expected = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.02)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_paired_test_equals_scipy(count):
    a, b = DRAW.normal(0.0, 1.0, count), DRAW.normal(0.8, 1.0, count)
    expected = scipy.stats.ttest_rel(a, b)
    found = ours.paired_test(list(a), list(b))
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.deviation == pytest.approx(np.std(a - b, ddof=1), rel=1e-9)


def test_sign_flips_equal_scipy():
    differences = DRAW.normal(0.6, 1.0, 7)
    expected = scipy.stats.permutation_test((differences,), lambda x: x.sum(), permutation_type="samples", vectorized=False)
    assert ours.sign_flip_p(list(differences)) == pytest.approx(expected.pvalue, abs=1e-12)
    assert ours.sign_flip_p([1.0] * 6) == 2 / 64


def test_one_value_has_no_interval_and_tells_nothing():
    assert ours.mean_interval([0.5]) == ours.Interval(0.5, None, None, 1)
    assert ours.paired_test([0.75], [0.25]) == ours.Paired(ours.Interval(0.5, None, None, 1), None, None)
    with pytest.raises(ValueError, match="at least one"):
        ours.mean_interval([])


def test_equal_differences():
    assert ours.paired_test([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert ours.paired_test([2.0, 3.0], [1.0, 2.0]).p == 0.0


def test_equal_values_of_a_rounded_metric_are_no_certainty():
    assert ours.mean_interval([1.0, 1.0, 1.0]).high == 1.0
    found = ours.mean_interval([1.0, 1.0, 1.0], resolution=0.01)
    assert found.high == pytest.approx(1.0 + scipy.stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(12) / np.sqrt(3))


def test_many_signs_are_flipped_at_random():
    differences = list(DRAW.normal(0.4, 1.0, 24))
    expected = scipy.stats.wilcoxon(differences).pvalue
    assert ours.sign_flip_p(differences) == pytest.approx(expected, abs=0.08)
    assert ours.sign_flip_p([1.0] * 24) < 1e-4


def test_pooled_deviation_is_the_root_of_the_mean_variance_of_equal_groups():
    groups = [list(DRAW.normal(size=4)) for _ in range(3)]
    expected = np.sqrt(np.mean([np.var(group, ddof=1) for group in groups]))
    assert ours.pooled_deviation(groups) == (pytest.approx(expected), 9)
    assert ours.pooled_deviation([[1.0], [2.0]]) == (0.0, 0)
