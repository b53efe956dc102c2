"""The functions that measure, at sizes of seconds, where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab.claims.cells import Cells
from attnlab.claims.measures import copying, partitions, rank, recall, streaming, weights
from attnlab.compare.layers import Layer
from attnlab.tasks.contract import IGNORE

TINY = {
    "seq_len": 16,
    "pairs": [2, 3],
    "vocab_size": 12,
    "dim": 8,
    "depth": 1,
    "num_heads": 1,
    "steps": 4,
    "batch_size": 4,
    "stop_loss": 0.0,
    "learning_rates": [0.01, 0.02],
    "seeds": 2,
    "examples": 8,
}


def test_recall_sweeps_then_repeats_the_best_rate(tmp_path):
    lines: list[str] = []
    found = recall.accuracy(Cells(tmp_path, lines.append), mixer="softmax", setup=TINY, against="delta_net")
    for mixer in ("softmax", "delta_net"):
        ran = [line for line in lines if f"recall: {mixer}" in line]
        assert len(ran) == 4 and sum("kept" in line for line in ran) == 1  # two rates, then two seeds, the first known
        kept = found.details[mixer]
        assert kept["rates"][f"{kept['rate']:g}"] == max(kept["rates"].values())
    ours, theirs, gap = (found.quantities[name] for name in ("accuracy", "other", "gap"))
    assert gap.mean == pytest.approx(theirs.mean - ours.mean)
    per_seed = [sum(scores.values()) / 2 for scores in found.details["softmax"]["test"]]
    assert ours.mean == pytest.approx(sum(per_seed) / 2) and ours.count == 2


def test_a_run_ends_once_its_loss_is_low_enough():
    setup = recall.Setup(mixer="softmax", **{**TINY, "stop_loss": 100.0})
    lines: list[str] = []
    result = recall.learn(setup, 0.01, 0, lines.append)
    assert [step for step, _ in result["loss"]] == [1] and lines[0].startswith("  step 1 of 4, loss ")
    assert set(result["test"]) == {"2", "3"} and result["status"] == "finished"


def test_training_batches_have_every_number_of_pairs():
    setup = recall.Setup(mixer="softmax", **TINY)
    task = recall.MixedRecall([setup.task(pairs) for pairs in (2, 3)])
    batches = task.train_batches(4, torch.Generator().manual_seed(0))
    seen = {int((next(batches).targets[0] != IGNORE).sum()) for _ in range(20)}
    assert seen == {2, 3}


@pytest.mark.parametrize(("mixer", "state"), [("aaren", 0.0), ("softmax", 1.0)])
def test_states_stay_or_grow(mixer, state):
    run = streaming.stream(Layer(mixer, True, 16, 2), [64, 128])
    assert math.log2(run["bytes"][1] / run["bytes"][0]) == pytest.approx(state, abs=0.05)
    assert 0 < run["seconds"][0] < run["seconds"][1]


def test_time_a_token_counts_every_call():
    calls: list[int] = []
    seconds = streaming.per_token(lambda: calls.append(sum(range(20_000))), 10)
    assert len(calls) > 2
    assert 0.5 * streaming.SHORTEST < seconds / 1e6 * 10 * (len(calls) - 1) < 3 * streaming.SHORTEST


def test_growth_of_time_and_exactness_give_their_numbers(tmp_path):
    cells = Cells(tmp_path)
    sizes = {"dim": 8, "num_heads": 1, "passes": 2}
    speed = streaming.constant_speed(cells, mixer="lightning", against="softmax", lengths=[16, 32], **sizes)
    assert set(speed.quantities) == {"growth", "other_growth", "microseconds"}
    time = streaming.cumulative(cells, mixer="aaren", against="softmax", marks=[8, 16], **sizes)
    assert time.quantities["state"].mean == 0.0 and time.quantities["other_state"].mean > 0.5
    exact = streaming.exactness(cells, tokens=70, head_dim=8, num_heads=2, draws=2)
    assert 0 < exact.quantities["error"].mean < 1e-5 and 0 < exact.quantities["gradient_error"].mean < 1e-5


def test_weights_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, n, 4, generator=generator, dtype=torch.float64) for n in (3, 5))
    expected = (q @ k.mT / 2).softmax(-1)[0, 0]
    torch.testing.assert_close(weights.weights_of("softmax", {}, q, k), expected)
    features = q.exp()
    phi = torch.nn.functional.elu(weights.features_to_query(features)) + 1
    torch.testing.assert_close(phi, features)


def test_collinear_queries_and_sharpness_find_what_the_formulas_say(tmp_path):
    cells = Cells(tmp_path)
    relu = {"name": "linear", "feature_map": "relu"}
    pairs = {"head_dim": 8, "keys": 16, "queries": 8, "draws": 2}
    inline = {"name": "inline", "kernel": "identity", "residual": False}
    found = weights.collinear(cells, linear=relu, injective=inline, **pairs).quantities
    assert (found["linear_confused"].mean, found["injective_confused"].mean) == (1.0, 0.0)
    swapped = weights.collinear(cells, linear=inline, injective=relu, **pairs).quantities
    assert (swapped["linear_confused"].mean, swapped["injective_confused"].mean) == (0.0, 1.0)
    plain = {"name": "linear", "feature_map": "elu"}
    mala = {"name": "mala", "rotary": False, "gate": False, "local_kernel": 0}
    sizes = {"head_dim": 8, "keys": 16, "lengths": [1.0, 3.0], "draws": 2}
    grown = weights.sharpness(cells, linear=plain, aware=mala, softmax={"name": "softmax"}, **sizes).quantities
    assert grown["linear"].mean == pytest.approx(1.0) and grown["softmax"].mean == pytest.approx(3.0)
    assert 1.0 < grown["aware"].mean < 3.0


def test_ranks_of_known_matrices():
    assert rank.share_of_full_rank(torch.eye(4).expand(2, 4, 4), 0.01) == 1.0
    assert rank.share_of_full_rank(torch.ones(1, 4, 8), 0.01) == 0.25
    assert rank.share_of_full_rank(torch.diag(torch.tensor([1.0, 0.5, 0.005, 0.0]))[None], 0.01) == 0.5


def test_an_encoder_gives_ranks_of_all_its_layers(tmp_path):
    bare = {"augment": False, "gate": False, "rotary": False, "local_kernel": 0}
    options = {"plain": bare, "weighed": {**bare, "augment": True}, "gated": {**bare, "gate": True}}
    found = rank.augmentation(Cells(tmp_path), **options, dim=8, steps=2, rate=0.01, tolerance=0.01, seeds=2)
    assert all(0.0 < q.mean <= 1.0 for name, q in found.quantities.items() if "gain" not in name)
    gain = found.quantities["full_output"].mean - found.quantities["plain_output"].mean
    assert found.quantities["output_gain"].mean == pytest.approx(gain)


def test_selection_compares_at_each_best_rate(tmp_path):
    setup = {"length": 8, "count": 2, "vocab_size": 6, "examples": 8, "dim": 8, "depth": 1, "steps": 2, "batch_size": 2}
    setup |= {"learning_rates": [0.01, 0.02], "seeds": 2}
    found = copying.selection(Cells(tmp_path), mixer="mamba", selective={}, invariant={"selective": []}, setup=setup)
    both = found.quantities["selective"].mean - found.quantities["invariant"].mean
    assert found.quantities["gap"].mean == pytest.approx(both)


def test_expansion_tells_the_gain_of_the_largest_state(tmp_path):
    found = partitions.expansion(
        Cells(tmp_path),
        mixer="sparse_state_expansion",
        option="num_partitions",
        sizes=[2, 3],
        options={"head_dim": 4},
        setup={**TINY, "learning_rates": [0.01]},
    )
    gain = found.quantities["accuracy_3"].mean - found.quantities["accuracy_2"].mean
    assert found.quantities["gain"].mean == pytest.approx(gain)
    assert found.quantities["rises"].mean == float(gain > 0)
