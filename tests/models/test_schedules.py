"""Layer schedules: which mixer stands where, in models by name, and the models that they make."""

from __future__ import annotations

import pytest
import torch

from attnlab import UnknownNameError
from attnlab.models import CausalLM, EncoderClassifier, create_schedule, list_schedules, schedule_info


def _pattern(name: str, depth: int, **options) -> str:
    """A letter a layer: the first of its mixer's name."""
    return "".join(mixer[0] for mixer in create_schedule(name, depth, **options))


@pytest.mark.tier("T2", "schedule:full_at_bottom")
def test_full_at_bottom() -> None:
    assert create_schedule("full_at_bottom", 3, num_full=1) == ["softmax", "sliding_window", "sliding_window"]
    names = {"full": "full", "local": "local"}
    assert _pattern("full_at_bottom", 24, **names) == "f" * 4 + "l" * 20  # 4 of 24, as in the paper
    assert _pattern("full_at_bottom", 24, num_full=8, **names) == "f" * 8 + "l" * 16
    assert _pattern("full_at_bottom", 2, **names) == "fl"
    assert _pattern("full_at_bottom", 6, num_full=0, **names) == "llllll"
    assert _pattern("full_at_bottom", 6, num_full=2, place="middle", **names) == "llffll"
    assert _pattern("full_at_bottom", 6, num_full=2, place="top", **names) == "llllff"


@pytest.mark.tier("T2", "schedule:interleaved")
def test_interleaved() -> None:
    names = {"full": "full", "local": "local"}
    assert _pattern("interleaved", 5, **names) == "lflfl"
    assert _pattern("interleaved", 7, every=3, **names) == "llfllfl"
    assert _pattern("interleaved", 3, every=1, **names) == "fff"
    assert _pattern("interleaved", 2, every=5, **names) == "ll"


@pytest.mark.tier("T2", "schedule:quarter_softmax")
def test_quarter_softmax() -> None:
    assert _pattern("quarter_softmax", 8) == "llls" * 2
    assert create_schedule("quarter_softmax", 16, local="delta_net").count("softmax") == 4


@pytest.mark.tier("T2", "schedule:delta_hybrid")
def test_delta_hybrid() -> None:
    assert create_schedule("delta_hybrid", 4) == ["delta_net", "sliding_window"] * 2
    every = create_schedule("delta_hybrid", 24, form="global")
    assert [layer + 1 for layer, name in enumerate(every) if name == "softmax"] == [2, 13]
    assert create_schedule("delta_hybrid", 2, form="global") == ["delta_net", "softmax"]


@pytest.mark.parametrize("name", list_schedules())
def test_every_schedule_fills_the_layers_of_a_language_model(name) -> None:
    model = CausalLM(11, 8, 4, num_heads=2, schedule=name)
    assert [type(block.mixer).info.name for block in model.blocks] == create_schedule(name, 4)
    assert model(torch.randint(11, (2, 9))).shape == (2, 9, 11)
    assert schedule_info(name).paper is not None


def test_a_model_hands_options_to_the_schedule_and_to_its_mixers() -> None:
    model = CausalLM(
        11,
        8,
        3,
        num_heads=2,
        schedule="full_at_bottom",
        schedule_options={"num_full": 2, "place": "top"},
        mixer_options={"sliding_window": {"window": 3}, "softmax": {"num_kv_heads": 1}},
    )
    assert [type(block.mixer).info.name for block in model.blocks] == ["sliding_window", "softmax", "softmax"]
    assert model.blocks[0].mixer.window == 3
    assert model.blocks[2].mixer.num_kv_heads == 1


def test_only_full_layers_reach_far() -> None:
    ids = torch.randint(11, (1, 12))
    for num_full, reaches in ((0, False), (1, True)):
        model = CausalLM(
            11,
            8,
            2,
            num_heads=2,
            schedule="full_at_bottom",
            schedule_options={"num_full": num_full},
            mixer_options={"sliding_window": {"window": 3}},
        )
        x = model.embedding(ids).detach().requires_grad_()
        model.embedding.register_forward_hook(lambda *_, x=x: x)
        (gradient,) = torch.autograd.grad(model(ids)[0, -1].square().sum(), x)
        assert bool(gradient[0, 0].abs().sum() > 0) == reaches


def test_an_encoder_takes_a_schedule() -> None:
    model = EncoderClassifier(
        3, 8, 4, num_heads=2, vocab_size=11, max_length=9, schedule="interleaved", schedule_options={"local": "pooling"}
    )
    assert [type(block.mixer).info.name for block in model.blocks] == ["pooling", "softmax"] * 2
    assert model(torch.randint(11, (2, 9))).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedule_options": {"num_full": 1}}, "schedule_options: expected none"),
        ({"schedule": "interleaved", "mixer": "linear"}, "mixer: expected none beside"),
        ({"schedule": "interleaved", "mixer_options": {"window": 3}}, "mixer_options: expected a mapping"),
        ({"schedule": "interleaved", "mixer_options": [{}, {}]}, "mixer_options: expected a mapping"),
        ({"schedule": "interleaved", "schedule_options": {"every": 0}}, "every: expected at least 1"),
        ({"schedule": "delta_hybrid", "schedule_options": {"form": "local"}}, "form: expected"),
        ({"schedule": "full_at_bottom", "schedule_options": {"num_full": 3}}, "num_full: expected 0 to depth=2"),
        ({"schedule": "full_at_bottom", "schedule_options": {"place": "left"}}, "place: expected one of"),
        ({"channel_options": [{"hidden": 8}]}, "channel_options: expected one mapping, or 2"),
    ],
)
def test_what_does_not_fit(options, said) -> None:
    with pytest.raises(ValueError, match=said):
        CausalLM(11, 8, 2, num_heads=2, **options)


def test_an_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="interleaved"):
        create_schedule("interleave", 4)
    with pytest.raises(ValueError, match="depth"):
        create_schedule("interleaved", 0)
