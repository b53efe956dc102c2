"""Everything that is part of a model trains: 200 steps on images and on text, the loss falls and stays finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnlab
from attnlab.channel_mixers import list_channel_mixers
from attnlab.models import create_model, list_schedules
from attnlab.positions import positions
from attnlab.tasks import create_task, reference_model
from attnlab.training import train

pytestmark = pytest.mark.slow
STEPS, WIDTH, HEADS = 200, 32, 4
IMAGES = attnlab.list_mixers()
TEXTS = [name for name in IMAGES if attnlab.mixer_info(name).supports.causal != "no"]
ORDERED = [name for name in positions.names() if not positions.get(name).factory.reads_future]


@pytest.fixture
def digits():
    return create_task("digits", patch=2)


@pytest.fixture
def text():
    return create_task("stdlib_text", seq_len=32)


def _with_mixer(task, mixer: str) -> nn.Module:
    options = dict(attnlab.mixer_info(mixer).example)
    options.pop(attnlab.mixer_info(mixer).supports.tokens_option, None)
    return reference_model(task, mixer, mixer_options=options, dim=WIDTH, num_heads=HEADS, depth=2).model


def _model(task, **options) -> nn.Module:
    torch.manual_seed(0)
    return create_model(task.model, **{**task.model_options, "dim": WIDTH, "num_heads": HEADS, "depth": 2, **options})


def _assert_it_learns(model: nn.Module, task) -> None:
    batch_size = 32 if task.model == "encoder" else 16
    result = train(model, task, steps=STEPS, batch_size=batch_size, learning_rate=1e-3, eval_split=None, log_every=20)
    losses = [row.loss for row in result.history]
    assert result.status == "finished" and result.steps == STEPS
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mixer", IMAGES)
def test_every_mixer_on_images(mixer: str, digits) -> None:
    _assert_it_learns(_with_mixer(digits, mixer), digits)


@pytest.mark.parametrize("mixer", TEXTS)
def test_every_mixer_on_text(mixer: str, text) -> None:
    _assert_it_learns(_with_mixer(text, mixer), text)


@pytest.mark.parametrize("position", positions.names())
def test_every_position_on_images(position: str, digits) -> None:
    _assert_it_learns(_model(digits, mixer="softmax", mixer_options={"position": position}), digits)


@pytest.mark.parametrize("position", ORDERED)
def test_every_position_on_text(position: str, text) -> None:
    known = {option.name for option in positions.info(position).options}
    own = {name: value for name, value in {"rank": 1, "span": 32, "size": 32}.items() if name in known}
    _assert_it_learns(_model(text, mixer="softmax", mixer_options={"position": position, "position_options": own}), text)


@pytest.mark.parametrize("channel_mixer", list_channel_mixers())
def test_every_channel_mixer_on_images(channel_mixer: str, digits) -> None:
    fixed = {"slot_mlp": {"num_slots": 16}}.get(channel_mixer, {})
    _assert_it_learns(_model(digits, channel_mixer=channel_mixer, channel_options=fixed), digits)


@pytest.mark.parametrize("schedule", list_schedules())
def test_every_schedule_on_text(schedule: str, text) -> None:
    _assert_it_learns(_model(text, schedule=schedule, depth=4), text)


@pytest.mark.parametrize("init", ["keep", "paper"])
def test_sigma_reparam_on_images(init: str, digits) -> None:
    model = attnlab.apply_modifier(_model(digits, norm="layer_norm"), "sigma_reparam", init=init)
    _assert_it_learns(attnlab.apply_modifier(model, "remove_norms"), digits)
