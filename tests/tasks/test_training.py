"""Every mixer trains: 200 steps of a small ViT on digits and of a small language model, the loss falls and stays finite."""

from __future__ import annotations

import pytest

import attnlab
from attnlab.tasks import create_task, reference_model
from attnlab.training import train

pytestmark = pytest.mark.slow
STEPS, WIDTH, HEADS = 200, 32, 4
IMAGES = attnlab.list_mixers()
TEXTS = [name for name in IMAGES if attnlab.mixer_info(name).supports.causal != "no"]


def _falls(task, mixer: str, batch_size: int) -> None:
    options = dict(attnlab.mixer_info(mixer).example)
    option = attnlab.mixer_info(mixer).supports.tokens_option
    options.pop(option, None)
    model = reference_model(task, mixer, mixer_options=options, dim=WIDTH, num_heads=HEADS, depth=2).model
    result = train(model, task, steps=STEPS, batch_size=batch_size, learning_rate=1e-3, eval_split=None, log_every=20)
    losses = [row.loss for row in result.history]
    print(f"{mixer}: {losses[0]:.3f} to {losses[-1]:.3f}")
    assert result.status == "finished" and result.steps == STEPS
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mixer", IMAGES)
def test_a_small_vit_on_digits(mixer: str) -> None:
    _falls(create_task("digits", patch=2), mixer, 32)


@pytest.mark.parametrize("mixer", TEXTS)
def test_a_small_language_model_on_text(mixer: str) -> None:
    _falls(create_task("stdlib_text", seq_len=32), mixer, 16)
