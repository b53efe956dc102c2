from __future__ import annotations

import pytest
import torch

from attnlab.core.errors import UnsupportedError
from attnlab.tasks import IGNORE, create_task, reference_model

SMALL = {"max_bytes": 1_500_000, "eval_examples": 60}


def test_hidden_bytes_are_those_asked_for():
    task = create_task("cab_ns", **SMALL)
    batch = task.examples("valid")
    hidden = batch.inputs == 256
    assert torch.equal(hidden, batch.targets != IGNORE)
    assert abs(hidden.float().mean() - 0.15) < 4 * (0.15 * 0.85 / hidden.numel()) ** 0.5
    text = task.corpus.splits["valid"].numpy().tobytes()
    for row in torch.where(hidden, batch.targets, batch.inputs):
        assert bytes(row.tolist()) in text


def test_the_answer_is_the_text_backwards():
    batch = create_task("cab_cc", **SMALL).examples("test")
    assert torch.equal(batch.targets, batch.context.flip(1))
    assert (batch.inputs[:, 0] == 256).all() and torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


@pytest.mark.parametrize("name", ["cab_ns", "cab_cc"])
def test_text_baselines_are_in_order(name):
    values = create_task(name, **SMALL).baselines()
    assert 8.0 == values["uniform"] > values["unigram"] > values["bigram"] > 1.0


def test_a_season_comes_again():
    task = create_task("cab_nc", noise=0.0, eval_examples=50)
    values = task.baselines()
    assert values["season"] < 1e-10 and values["mean"] < values["last"]
    noisy = create_task("cab_nc", noise=0.3, eval_examples=2000).baselines()
    assert noisy["season"] == pytest.approx(0.09 * (1 + 6 / 24), rel=0.05) and noisy["zero"] == pytest.approx(1.09, rel=0.05)


def test_cross_patterns_refuse_what_has_no_cross_form():
    for name in ("cab_nc", "cab_cc"):
        with pytest.raises(UnsupportedError, match="'mamba' does not support a second sequence to read"):
            reference_model(create_task(name), "mamba")
    reference_model(create_task("cab_nc"), "flow")
    with pytest.raises(UnsupportedError, match="'flow' does not support causal queries"):
        reference_model(create_task("cab_cc", **SMALL), "flow")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cab_ns", {"hidden": 1.0}, r"hidden: expected a probability in \(0, 1\), got 1\.0"),
        ("cab_cc", {"seq_len": 1}, "seq_len: expected 2 to"),
        ("cab_nc", {"past": 4}, "past, future, channels, period, noise: expected a period"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_task(name, **options)
