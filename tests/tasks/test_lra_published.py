"""What was published of Long Range Arena, as data, and the rates of its optimisers."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab.core.errors import UnknownNameError
from attnlab.models import count_parameters
from attnlab.tasks.lra.published import (
    published_attention,
    published_model,
    published_results,
    published_settings,
    within_budget,
)
from attnlab.training.optimizer import rate_factor
from attnlab.training.rates import cosine_cycle_factor, rsqrt_factor
from attnlab.training.run import Recipe

NAMES = {"listops", "text", "retrieval", "image", "image_other", "pathfinder", "path_x"}


def test_averages_are_those_of_the_five_tasks():
    table = {row.model: row for row in published_results()}
    assert len(table) == 13 and published_attention()["local"] == "block 50"
    for row in table.values():
        mean = (row.listops + row.text + row.retrieval + row.image + row.pathfinder) / 5
        # one printed average is not that of its row
        assert mean == pytest.approx(row.average, abs=0.2 if row.model == "Sinkhorn Trans." else 0.0051)
        assert row.path_x is None and row.path_x_status in ("chance", "not reported")
    assert table["Transformer"].average == 54.39


@pytest.mark.parametrize("name", sorted(NAMES))
def test_published_models_are_built_and_trained_as_published(name):
    setting = published_settings()[name]
    with torch.device("meta"):
        model = published_model(name)
    assert len(model.blocks) == setting.num_layers and model.dim == setting.emb
    assert model.blocks[0].channel_mixer.hidden == setting.mlp
    Recipe(**{"seed": 0, "autocast": None, "auxiliary": {}, **setting.recipe()})
    # the named schedule at the recipe's share and peak is the published rate
    recipe = setting.recipe()
    for step in (0, 1, 100, setting.steps // 2, setting.steps - 1):
        ours = recipe["learning_rate"] * rate_factor(step, setting.steps, recipe["warmup"], setting.schedule)
        if setting.schedule == "rsqrt":
            expected = setting.learning_rate * rsqrt_factor(step, setting.warmup)
        else:
            expected = setting.learning_rate * cosine_cycle_factor(step, setting.warmup, setting.steps)
        assert ours == pytest.approx(expected, rel=1e-9)


def test_any_mixer_takes_the_place_of_attention():
    assert set(published_settings()) == NAMES
    with torch.device("meta"):
        models = {mixer: published_model("pathfinder", mixer) for mixer in ("softmax", "delta_net", "mamba")}
        causal = published_model("listops", "mamba")
    assert causal.pool == "mean" and within_budget(models["softmax"], models["softmax"])
    base = count_parameters(models["softmax"])
    assert within_budget(int(1.1 * base), models["softmax"]) and not within_budget(int(1.1 * base) + 2, base)
    with pytest.raises(UnknownNameError, match="'path_x'"):
        published_model("pathx")


def test_rates_rise_to_their_peak_and_fall():
    assert rsqrt_factor(0, 100) == 0.0 and rsqrt_factor(100, 100) == 0.1 and rsqrt_factor(400, 100) == 0.05
    assert cosine_cycle_factor(50, 100, 1000) == 0.5 and cosine_cycle_factor(600, 100, 1000) == pytest.approx(0.5)
    assert cosine_cycle_factor(1100, 100, 1000) == 1.0  # a cycle later it begins again
    assert max(rate_factor(step, 1000, 0.1, "rsqrt") for step in range(1000)) == pytest.approx(1.0)
    assert rate_factor(999, 1000, 0.1, "rsqrt") == pytest.approx(math.sqrt(100 / 999))
    assert rate_factor(999, 1000, 0.0, "cosine_cycle") < 1e-5
