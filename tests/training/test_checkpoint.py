from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from attnlab.tasks import create_task, reference_model
from attnlab.training import checkpoint, train

RECIPE = {"steps": 12, "batch_size": 4, "learning_rate": 1e-2, "log_every": 5}


@pytest.fixture
def task():
    return create_task("recall", seq_len=16, num_pairs=2, vocab_size=16, eval_examples=20)


def make(task, seed=0, own_generator=False):
    model = reference_model(task, "delta_net", dim=8, depth=2, seed=seed).model
    for block in model.blocks:
        block.mixer_residual.drop_path = 0.3
        if own_generator:
            block.mixer_residual.generator = torch.Generator().manual_seed(11)
    return model


class Killed(Exception):
    pass


def kill(row):
    if row.step == 10:
        raise Killed


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_resumed_run_ends_bit_equal(task, tmp_path, own_generator):
    whole = make(task, own_generator=own_generator)
    expected = train(whole, task, **RECIPE)

    path = tmp_path / "runs" / "cell.safetensors"
    with pytest.raises(Killed):
        train(make(task, own_generator=own_generator), task, checkpoint=path, checkpoint_every=7, callback=kill, **RECIPE)
    torch.rand(5)  # what others draw in between makes no difference
    resumed = make(task, seed=9, own_generator=own_generator)
    result = train(resumed, task, checkpoint=path, **RECIPE)

    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert result.metrics == expected.metrics and result.steps == 12
    assert [(row.step, row.loss, row.gradient_norm) for row in result.history] == [
        (row.step, row.loss, row.gradient_norm) for row in expected.history
    ]
    assert os.listdir(path.parent) == ["cell.safetensors"]


def test_a_finished_run_is_not_trained_again(task, tmp_path):
    path = tmp_path / "cell.safetensors"
    first = train(make(task), task, checkpoint=path, **RECIPE)
    rows = []
    again = train(make(task, seed=3), task, checkpoint=path, callback=rows.append, **RECIPE)
    assert again == first and rows == []


def test_the_time_limit_leaves_a_checkpoint_to_go_on_from(task, tmp_path):
    path = tmp_path / "cell.safetensors"
    stopped = train(make(task), task, checkpoint=path, time_limit=0.0, **RECIPE)
    assert stopped.status == "time_limit" and path.exists()
    assert train(make(task), task, checkpoint=path, **RECIPE).status == "finished"


def test_a_checkpoint_of_another_run_is_refused(task, tmp_path):
    path = tmp_path / "cell.safetensors"
    train(make(task), task, checkpoint=path, **RECIPE)
    with pytest.raises(ValueError, match=r"belongs to another run \(learning_rate: expected 0.02, got 0.01\)"):
        train(make(task), task, checkpoint=path, **{**RECIPE, "learning_rate": 0.02})
    with pytest.raises(ValueError, match=r"belongs to another run \(model: "):
        train(reference_model(task, "linear", dim=8, depth=2).model, task, checkpoint=path, **RECIPE)
    other = create_task("recall", seq_len=16, num_pairs=2, vocab_size=16, eval_examples=20, seed=5)
    with pytest.raises(ValueError, match=r"belongs to another run \(data: "):
        train(make(task), other, checkpoint=path, **RECIPE)


def test_a_file_that_is_no_checkpoint_is_refused(task, tmp_path):
    path = tmp_path / "cell.safetensors"
    path.write_bytes(b"not one")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        train(make(task), task, checkpoint=path, **RECIPE)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"was not written by attnlab\.training"):
        train(make(task), task, checkpoint=path, **RECIPE)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "cell.safetensors"
    checkpoint.save(path, {"x": torch.ones(2)}, {"step": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"x": torch.zeros(2)}, {"step": 2})
    tensors, facts = checkpoint.load(path)
    assert torch.equal(tensors["x"], torch.ones(2)) and facts == {"step": 1}
    assert os.listdir(tmp_path) == ["cell.safetensors"]
