"""The measures that need no training, or a few steps of it, where the answer is known."""

from __future__ import annotations

import pytest
import torch

from attnlab.claims.cells import Cells
from attnlab.claims.measures import reach, regression, sampling, sinks, tables, tiles
from attnlab.models import create_model
from attnlab.tasks.bigram_backcopy.task import BigramBackcopy


def test_windows_see_themselves_and_residuals_add_nothing():
    layers = reach.build([{"name": "window", "window": 2}, {"name": "window", "window": 2}], 8, 2, 0)
    seen = reach.dependence(layers, [6], 8, 0)
    blocks = torch.arange(6) // 2
    assert torch.equal(seen, blocks[:, None] == blocks)


def test_receptive_fields_count_what_is_allowed(tmp_path):
    stacks = {"all": [{"name": "softmax", "causal": True}], "near": [{"name": "sliding_window", "window": 2, "causal": True}]}
    found = reach.receptive_fields(Cells(tmp_path), grid=[5], dim=8, num_heads=2, stacks=stacks, draws=1, causal=True).quantities
    assert found["all"].mean == found["all_mean"].mean == 1.0 and found["all_tokens"].mean == 3
    assert found["near"].mean == pytest.approx(2 / 5) and found["near_tokens"].mean == 2


def test_the_index_is_that_of_the_definition_and_disagreement_is_seen(tmp_path):
    right = {"pattern": "causal_self", "task": "language", "digits": [2], "scores": {"flash": [16.02]}}
    found = tables.cab_index(Cells(tmp_path), tables=[right])
    assert found.quantities["agree"].mean == 1.0
    assert found.details["indexes"][0]["index"] == pytest.approx((22.26 - 16.02) / 8.29944)
    wrong = {**right, "scores": {"flash": [16.04]}}
    assert tables.cab_index(Cells(tmp_path), tables=[right, wrong]).quantities["agree"].mean == 0.5


def test_trees_of_digits_have_the_value_of_their_root(tmp_path):
    sizes = {"max_depth": 3, "max_args": 3, "min_length": 3, "max_length": 30}
    found = tables.listops_baselines(Cells(tmp_path), settings=sizes, trees=60, draws=2).quantities
    assert 0.1 <= found["majority"].mean <= found["root_operator"].mean < 1.0 and 3 < found["length"].mean < 30


def test_a_stride_of_the_tile_reaches_the_bound(tmp_path):
    case = {"grid": [32], "window": [12], "tile": [4], "strides": [[1], [2], [4]]}
    found = tiles.stride_bounds(Cells(tmp_path), cases=[case]).quantities
    assert found["strided"].mean == 1.0 > found["plain"].mean and found["rises"].mean == 1.0
    backwards = {**case, "strides": [[4], [1]]}
    assert tiles.stride_bounds(Cells(tmp_path), cases=[backwards]).quantities["rises"].mean == 0.0


def test_the_best_multiple_is_used_where_it_may_be():
    guess, truth = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    assert regression.error(guess, truth) == 0.0 and regression.error(guess, truth, scaled=False) == 2.5


def test_small_scores_make_a_step_of_descent(tmp_path):
    cells = Cells(tmp_path)
    sizes = {"dim": 3, "length": 12, "variance": 0.1, "count": 200, "draws": 2}
    found = regression.two_heads(cells, omegas=[0.2, 0.1, 0.05], **sizes).quantities
    assert found["distance"].mean < 0.02 and found["order"].mean == pytest.approx(2.0, abs=0.1)
    assert found["gain"].mean == pytest.approx(found["one"].mean - found["two"].mean)
    predicted = regression.predicted_loss(cells, omegas=[0.1], **{**sizes, "length": 64}).quantities
    assert set(predicted) == {"one", "two"} and predicted["one"].mean < 0.3
    ridge = regression.ridge_limit(cells, dim=8, ratios=[0.25, 0.5], variance=0.1, count=300, draws=2)
    assert ridge.details["worst"] in ("0.25", "0.5") and ridge.quantities["ratio"].mean == pytest.approx(1.0, abs=0.4)


def test_enough_samples_leave_no_error_worth_naming(tmp_path):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 32, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    few, many = sampling.relative_errors(q, k, v, [(1, 8), (1, 20_000)], 0)
    assert many < 0.1 < few
    assert sampling.spectral_norm(v[0, 0]) == pytest.approx(float(torch.linalg.matrix_norm(v[0, 0], 2)))
    assert sampling.slope([1.0, 2.0, 4.0], [3.0, 1.5, 0.75]) == pytest.approx(-1.0)
    sizes = {"tokens": 32, "head_dim": 8, "samples": [4, 8], "block": 8, "clusters": 4, "spread": 0.1, "draws": 2}
    found = sampling.samples_and_blocks(Cells(tmp_path), **sizes).quantities
    assert set(found) == {"exponent", "scattered", "gain"} and found["gain"].mean > 0


def test_sinks_are_read_off_the_attention(tmp_path):
    task = BigramBackcopy(16, eval_examples=8)
    model = create_model("causal_lm", dim=8, depth=1, mixer="softmax", num_heads=1, **task.model_options)
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        mixer.q_proj.weight.zero_()
    found = sinks.probe(model, task)  # without queries every row is uniform
    trigger = torch.from_numpy(task.language.is_trigger(task.examples("test").inputs.numpy()))
    plain = ~trigger
    plain[:, 0] = False
    weights = 1.0 / torch.arange(1, 17).expand(8, 16)
    assert found["sink"] == pytest.approx(float(weights[plain].mean()), rel=1e-5)
    assert found["previous"] == pytest.approx(float(weights[trigger].mean()), rel=1e-5)
    sizes = {"seq_len": 16, "dim": 8, "steps": 2, "batch_size": 4, "rate": 0.003, "seeds": 2}
    quantities = sinks.backcopy(Cells(tmp_path), mixer="softmax", against="relu", **sizes).quantities
    assert {"sink", "previous", "value", "copy_loss", "other_sink"} <= set(quantities)
