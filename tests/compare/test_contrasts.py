"""Corrected tests, ranks and power, against scipy, closed forms and simulated mechanisms that are all the same."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from attnlab.compare.contrasts import (
    POWER,
    Question,
    contrasts,
    detectable,
    holm,
    power,
    rank,
    seeds_needed,
    typical_deviation,
)
from attnlab.compare.statistics import paired_test


def verdict(a, b, higher_is_better=True, resolution=0.0):
    return contrasts([Question(a, b, higher_is_better, resolution)])[0].verdict


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_family_wise_rate_of_bonferroni_or_better():
    p = np.random.default_rng(0).uniform(size=20) ** 3
    assert all(a <= b for a, b in zip(holm(list(p)), np.minimum(1.0, 20 * p), strict=True))
    order = np.argsort(p)
    assert (np.diff(np.asarray(holm(list(p)))[order]) >= 0).all()


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("draw", ["normal", "accuracy"])
def test_identical_mechanisms_are_called_different_in_at_most_six_per_cent_of_comparisons(seeds, draw):
    """500 comparisons of four identical mechanisms: one wrong pair anywhere in a comparison counts."""
    chance = np.random.default_rng(seeds)
    called = 0
    for _ in range(500):
        values = chance.normal(0.5, 0.05, (4, seeds)) if draw == "normal" else chance.binomial(256, 0.9, (4, seeds)) / 256
        named = {str(i): dict(enumerate(map(float, row))) for i, row in enumerate(values)}
        ranks = rank(named, higher_is_better=True, resolution=0.0 if draw == "normal" else 1 / 256)
        called += any((found.best, found.worst) != (1, 4) for found in ranks.values())
    assert called <= 0.06 * 500


def test_a_large_difference_is_told_even_in_a_large_family():
    chance = np.random.default_rng(1)
    seeds = {f"{i}": dict(enumerate(chance.normal(i, 0.01, 5))) for i in range(6)}
    ranks = rank(seeds, higher_is_better=True)
    assert [ranks[str(i)].text for i in range(6)] == ["6", "5", "4", "3", "2", "1"]


def test_questions_asked_together_are_harder_to_answer():
    a, b = {0: 0.1, 1: 0.12, 2: 0.11, 3: 0.10}, {0: 0.13, 1: 0.17, 2: 0.13, 3: 0.14}
    alone = contrasts([Question(a, b, True)])[0]
    together = contrasts([Question(a, b, True)] * 20)[0]
    assert alone.paired is not None and alone.p == pytest.approx(scipy.stats.ttest_rel(list(a.values()), list(b.values())).pvalue)
    assert (alone.verdict, together.verdict) == ("worse", "cannot tell")
    assert together.p == pytest.approx(20 * alone.p)


def test_equal_values_of_a_rounded_metric_are_no_certainty():
    a, b = {0: 0.99, 1: 0.98}, {0: 0.98, 1: 0.97}
    assert verdict(a, b, resolution=0.01) == "cannot tell"
    assert verdict({0: 0.9, 1: 0.9}, {0: 0.1, 1: 0.1}, resolution=0.01) == "better"


def test_only_seeds_that_both_have_are_paired():
    assert verdict({0: 0.5, 2: 0.7}, {0: 0.4, 1: 0.9, 2: 0.6}) == "better"
    assert verdict({1: 0.5}, {0: 0.4}) == "cannot tell"
    assert verdict({0: 0.9}, {0: 0.1}) == "cannot tell", "one seed tells nothing"


def test_ranks_say_when_they_cannot_tell():
    values = {"good": {0: 0.90, 1: 0.91}, "also": {0: 0.70, 1: 0.99}, "bad": {0: 0.10, 1: 0.11}}
    ranks = rank(values, higher_is_better=True)
    assert (ranks["good"].best, ranks["good"].worst) == (1, 2)
    assert ranks["also"].text == "1–3", "two seeds whose differences scatter cannot tell it from the worst"
    assert ranks["bad"].text == "2–3"
    assert [ranks[name].position for name in values] == [1, 2, 3]
    assert rank(values, higher_is_better=False)["bad"].text == "1–2"


def test_power_equals_simulation():
    chance = np.random.default_rng(5)
    draws = chance.normal(0.8, 1.0, (20_000, 6))
    found = (scipy.stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05).mean()
    assert power(0.8, 1.0, 6) == pytest.approx(found, abs=0.012)
    assert power(0.0, 1.0, 6) == pytest.approx(0.05, abs=1e-9)
    assert power(1.0, 0.0, 3) == 1.0 and power(1.0, 1.0, 1) == 0.0


def test_seeds_needed_is_the_first_number_with_enough_power():
    a = [1.0, 1.3, 0.8, 1.4]
    found = paired_test(a, [0.9, 1.0, 0.9, 1.1])
    count = seeds_needed(found)
    assert count is not None and found.deviation is not None
    assert (
        power(found.difference.mean, found.deviation, count) >= POWER > power(found.difference.mean, found.deviation, count - 1)
    )
    assert seeds_needed(paired_test([1.0, 2.0], [2.0, 1.0])) is None, "nothing was seen"
    assert seeds_needed(paired_test([1.001, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])) is None, "more than anybody will run"


def test_detectable_is_where_the_power_is_reached():
    smallest = detectable(0.3, 5)
    assert smallest is not None and power(smallest, 0.3, 5) == pytest.approx(POWER, abs=1e-6)
    assert detectable(0.3, 1) is None


def test_typical_deviation_is_of_differences():
    values = [{0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}, {0: 0.0, 1: 2.0}]
    assert typical_deviation(values) == pytest.approx(np.sqrt(0.5))
    assert typical_deviation([{0: 1.0}, {0: 2.0}]) is None
