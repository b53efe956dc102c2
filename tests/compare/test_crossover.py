"""Crossover lengths of synthetic curves."""

from __future__ import annotations

import pytest

from attnlab.compare.crossover import crossover, growth, with_interval


def test_power_laws_cross_where_they_should():
    lengths = [256, 512, 1024, 2048]
    found = crossover(lengths, [700.0 / n for n in lengths])
    assert found.where == "at"
    assert found.length == pytest.approx(700)
    assert found.text == "700"


def test_outside_the_measured_range():
    assert crossover([256, 512], [1.5, 1.2]).text == "> 512"
    assert "not faster" in crossover([256, 512], [1.5, 1.0]).sentence
    assert crossover([256, 512], [0.5, 0.2]).text == "≤ 256"


def test_only_the_last_crossing_counts():
    found = crossover([1, 2, 4, 8], [0.5, 2.0, 0.5, 0.25])
    assert 2 < found.length < 4
    assert crossover([1, 2, 4], [0.5, 0.5, 2.0]).where == "never"


@pytest.mark.parametrize(("lengths", "ratios"), [([], []), ([1], [1.0, 2.0]), ([1, 2], [1.0, -1.0]), ([2, 1], [1.0, 1.0])])
def test_bad_curves_are_refused(lengths, ratios):
    with pytest.raises(ValueError, match="expected"):
        crossover(lengths, ratios)


def test_the_interval_of_a_crossover_is_that_of_the_ratios():
    lengths = [256, 512, 1024, 2048]
    ratios = [700.0 / n for n in lengths]
    found = with_interval(lengths, ratios, [r * 0.8 for r in ratios], [r * 1.3 for r in ratios])
    assert (found.length, found.low, found.high) == pytest.approx((700, 560, 910))
    assert found.interval == "560–910"
    far = with_interval(lengths, ratios, [r * 0.1 for r in ratios], [r * 9 for r in ratios])
    assert (far.low, far.high, far.interval) == (None, None, "")
    assert with_interval(lengths, ratios, [r * 0.1 for r in ratios], [r * 1.3 for r in ratios]).interval == "…–910"


def test_growth_is_the_exponent_of_a_power_law_without_its_fixed_cost():
    lengths = [256, 512, 1024, 2048, 4096]
    assert growth(lengths, [1e-6 * n**1.7 for n in lengths]) == pytest.approx(1.7)
    assert growth(lengths, [max(0.5, 1e-3 * n) for n in lengths]) == pytest.approx(1.0)
    assert growth([64], [1.0]) is None
