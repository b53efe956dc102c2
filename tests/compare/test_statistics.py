"""Statistics against scipy, and honesty with few values."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from attnlab.compare import statistics as ours

DRAW = np.random.default_rng(3)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 7, 10, 31, 100])
def test_t_distribution_equals_scipy(df):
    for t in (-40.0, -3.2, -1.0, -0.1, 0.0, 0.7, 2.0, 12.0):
        assert ours.t_cdf(t, df) == pytest.approx(scipy.stats.t.cdf(t, df), rel=1e-9, abs=1e-14)
    for p in (0.001, 0.025, 0.3, 0.5, 0.9, 0.975, 0.9995):
        assert ours.t_quantile(p, df) == pytest.approx(scipy.stats.t.ppf(p, df), rel=1e-9, abs=1e-12)


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
    assert (found.sign != 0) == (expected.pvalue < 0.05)


def test_sign_flips_equal_scipy():
    differences = DRAW.normal(0.6, 1.0, 7)
    expected = scipy.stats.permutation_test((differences,), lambda x: x.sum(), permutation_type="samples", vectorized=False)
    assert ours.sign_flip_p(list(differences)) == pytest.approx(expected.pvalue, abs=1e-12)
    assert ours.sign_flip_p([1.0] * 6) == 2 / 64


def test_one_value_has_no_interval_and_tells_nothing():
    assert ours.mean_interval([0.5]) == ours.Interval(0.5, None, None, 1)
    assert ours.paired_test([0.9], [0.1]).sign == 0
    assert ours.verdict({0: 0.9}, {0: 0.1}, higher_is_better=True) == "cannot tell"
    with pytest.raises(ValueError, match="at least one"):
        ours.mean_interval([])


def test_equal_differences():
    assert ours.paired_test([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert ours.paired_test([2.0, 3.0], [1.0, 2.0]).p == 0.0


def test_equal_values_of_a_rounded_metric_are_no_certainty():
    assert ours.mean_interval([1.0, 1.0, 1.0]).high == 1.0
    found = ours.mean_interval([1.0, 1.0, 1.0], resolution=0.01)
    assert found.high == pytest.approx(1.0 + scipy.stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(12) / np.sqrt(3))
    a, b = {0: 0.99, 1: 0.98}, {0: 0.98, 1: 0.97}
    assert ours.verdict(a, b, higher_is_better=True, resolution=0.01) == "cannot tell"
    assert ours.verdict({0: 0.9, 1: 0.9}, {0: 0.1, 1: 0.1}, higher_is_better=True, resolution=0.01) == "better"


def test_only_seeds_that_both_have_are_paired():
    a, b = {0: 0.5, 2: 0.7}, {0: 0.4, 1: 0.9, 2: 0.6}
    assert ours.verdict(a, b, higher_is_better=True) == "better"
    assert ours.verdict({1: 0.5}, {0: 0.4}, higher_is_better=True) == "cannot tell"


def test_many_signs_are_flipped_at_random():
    differences = list(DRAW.normal(0.4, 1.0, 24))
    expected = scipy.stats.wilcoxon(differences).pvalue
    assert ours.sign_flip_p(differences) == pytest.approx(expected, abs=0.08)
    assert ours.sign_flip_p([1.0] * 24) < 1e-4


def test_ranks_say_when_they_cannot_tell():
    values = {"good": {0: 0.90, 1: 0.91}, "also": {0: 0.70, 1: 0.99}, "bad": {0: 0.10, 1: 0.11}}
    ranks = ours.rank(values, higher_is_better=True)
    assert (ranks["good"].best, ranks["good"].worst) == (1, 2)
    assert ranks["also"].text == "1–3", "two seeds whose differences scatter cannot tell it from the worst"
    assert ranks["bad"].text == "2–3"
    assert [ranks[name].position for name in values] == [1, 2, 3]
    assert ours.rank(values, higher_is_better=False)["bad"].text == "1–2"


def test_pooled_deviation_is_the_root_of_the_mean_variance_of_equal_groups():
    groups = [list(DRAW.normal(size=4)) for _ in range(3)]
    expected = np.sqrt(np.mean([np.var(group, ddof=1) for group in groups]))
    assert ours.pooled_deviation(groups) == (pytest.approx(expected), 9)
    assert ours.pooled_deviation([[1.0], [2.0]]) == (0.0, 0)
