from __future__ import annotations

import math

import pytest

from attnlab.tasks.cab.index import (
    PATTERNS,
    compositional_index,
    efficiency_length,
    index_columns,
    published_efficiency_lengths,
    published_index,
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_mean_mechanism_has_index_zero_and_a_better_one_more(pattern):
    tasks = index_columns(pattern)
    means = {task: [mean for mean, _ in columns.values()] for task, columns in tasks.items()}
    assert all(value == 0.0 for value in compositional_index(pattern, means).values())
    lower = ("MCD", "MSD", "PPL", "CD-l1", "CD-l2", "MSE", "MAE")
    better = {
        task: [m + (-s if name.split()[-1] in lower else s) for name, (m, s) in columns.items()]
        for task, columns in tasks.items()
    }
    assert all(value == pytest.approx(1.0) for value in compositional_index(pattern, better).values())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_published_averages_are_those_of_their_tasks(pattern):
    for row in published_index(pattern).values():
        values = [value for name, value in row.items() if name != "average"]
        if not math.isnan(sum(values)):
            assert sum(values) / len(values) == pytest.approx(row["average"], abs=0.0021)


def test_a_published_score_gives_the_published_index():
    # raw scores of the paper are rounded, and so is what follows
    found = compositional_index("noncausal_cross", {
        "point_completion": [7.344, 0.227, 0.784],
        "forecasting": [1.147, 0.809, 0.489, 0.520, 0.519, 0.527],
    })  # fmt: skip
    row = published_index("noncausal_cross")["abc"]
    assert all(found[name] == pytest.approx(row[name], abs=0.03) for name in row)


def test_the_length_is_where_the_fitted_costs_meet():
    lengths = [256, 512, 1024, 2048]
    quadratic = [1e-3 * n**2 + 0.5 * n + 7.0 for n in lengths]
    line = [2.5 * n + 1007.0 for n in lengths]
    root = (2.0 + math.sqrt(4.0 + 4.0)) / 2e-3
    assert efficiency_length(lengths, quadratic, line) == pytest.approx(root)
    assert efficiency_length(lengths, quadratic, [9e9, *line[1:]], skip=1) == pytest.approx(root)
    assert efficiency_length(lengths, quadratic, [0.4 * n - 100.0 for n in lengths]) is None
    assert published_efficiency_lengths()["performer"] == {"time": 2361.0, "memory": 37.0}


def test_bad_scores():
    with pytest.raises(ValueError, match="pattern: expected one of"):
        compositional_index("causal", {})
    with pytest.raises(ValueError, match="scores: expected the tasks tts, summarisation, got tts"):
        compositional_index("causal_cross", {"tts": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"scores\['tts'\]: expected MCD, MSD, got 1 numbers"):
        compositional_index("causal_cross", {"tts": [1.0], "summarisation": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="lengths, softmax, candidate: expected as many"):
        efficiency_length([1, 2], [1.0, 2.0], [1.0, 2.0])
