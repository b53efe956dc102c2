from __future__ import annotations

import pytest
import torch
from torch import nn

import attnlab
from attnlab.models import CausalLM, EncoderClassifier, count_parameters, match_budget

TARGET = 40_000


def encoder(mixer):
    example = dict(attnlab.mixer_info(mixer).example)

    def build(width, hidden=None):
        channel = {} if hidden is None else {"hidden": hidden}
        size = {"patch_dim": 1, "grid": (8, 8)}
        return EncoderClassifier(10, width, 2, mixer, 4, input="patches", mixer_options=example, channel_options=channel, **size)

    return build


def language(mixer):
    example = dict(attnlab.mixer_info(mixer).example)
    if "max_length" in example:
        example["max_length"] = 16  # weights a position; what the checks need of it does not fit the budget

    def build(width, hidden=None):
        channel = {} if hidden is None else {"hidden": hidden}
        return CausalLM(64, width, 2, mixer, 4, mixer_options=example, channel_options=channel)

    return build


@pytest.mark.parametrize(
    "build",
    [pytest.param(encoder(name), id=f"encoder-{name}") for name in attnlab.list_mixers(grid=2)]
    + [pytest.param(language(name), id=f"language-{name}") for name in attnlab.list_mixers(causal=True)],
)
def test_every_mixer_meets_the_budget(build):
    match = match_budget(build, TARGET, multiple_of=4, fine=build)
    model = build(match.width, match.hidden)
    assert match.width % 4 == 0 and match.model is None
    assert match.parameters == count_parameters(model)
    assert abs(match.parameters - TARGET) <= 0.02 * TARGET
    assert match.relative_error == match.parameters / TARGET - 1


def test_nothing_is_allocated():
    def build(width):
        devices.add(torch.empty(0).device.type)
        return nn.Linear(width, width, bias=False)

    devices = set()
    match = match_budget(build, 8_000**2, multiple_of=100)
    assert (match.width, match.parameters, match.relative_error) == (8_000, 8_000**2, 0.0)
    assert devices == {"meta"}


def test_the_nearest_width_is_taken():
    for target in range(1, 500, 7):
        match = match_budget(lambda width: nn.Linear(width, width, bias=False), target, multiple_of=2, tolerance=10.0)
        assert match.width == min(range(2, 40, 2), key=lambda width: abs(width * width - target))


def test_a_budget_out_of_reach_is_an_error_that_names_the_nearest():
    def build(width):
        return nn.Linear(width, width, bias=False)

    with pytest.raises(ValueError, match=r"no width that is a multiple of 10 gives 150 .* nearest is width 10 with 100"):
        match_budget(build, 150, multiple_of=10)
    with pytest.raises(ValueError, match="nearest is width 16 with 256"):
        match_budget(build, 10**6, max_width=16)
    with pytest.raises(ValueError, match="expected positive integers"):
        match_budget(build, 0)


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 3)
    assert count_parameters(nn.Sequential(layer, layer)) == 12


def test_widths_that_a_model_refuses_are_passed_over():
    def build(width):
        if width < 4 or width % 6:
            raise ValueError("width: expected a multiple of 6")
        return nn.Linear(width, width, bias=False)

    assert match_budget(build, 18**2, multiple_of=2).width == 18
    with pytest.raises(ValueError, match="nearest is width 18 with 324"):
        match_budget(build, 20**2, multiple_of=2)
    with pytest.raises(ValueError, match="never"):
        match_budget(lambda width: (_ for _ in ()).throw(ValueError("never")), 100)
