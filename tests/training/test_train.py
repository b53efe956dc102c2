from __future__ import annotations

import itertools
import math

import pytest
import torch

from attnlab.tasks import create_task, reference_model
from attnlab.training import evaluate, train
from attnlab.training.evaluation import device_of
from attnlab.training.optimizer import make_optimizer, parameter_groups, rate_factor

QUICK = {"steps": 12, "batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture
def task():
    return create_task("recall", seq_len=16, num_pairs=2, vocab_size=16, eval_examples=20)


def make(task, mixer="softmax", **options):
    model = reference_model(task, mixer, dim=8, depth=2).model
    for block in model.blocks:
        block.mixer_residual.drop_path = options.get("drop_path", 0.0)
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_seed_gives_the_same_run_and_leaves_torch_alone(task):
    before, runs = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        model = make(task, drop_path=0.5)
        result = train(model, task, seed=seed, log_every=3, **QUICK)
        runs.append((state(model), [(row.loss, row.gradient_norm) for row in result.history], result.metrics))
        torch.rand(1 if seed else 0)
    assert equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]
    assert not equal(runs[0][0], runs[2][0])
    torch.set_rng_state(before)
    train(make(task), task, **QUICK)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loss_falls_and_the_report_adds_up(task):
    rows = []
    model = make(task)
    result = train(model, task, steps=60, batch_size=16, learning_rate=1e-2, log_every=25, callback=rows.append)
    assert result.status == "finished" and result.steps == 60
    assert [row.step for row in result.history] == [25, 50, 60] and result.history == rows
    assert result.history[-1].loss < 0.9 * result.history[0].loss
    assert result.tokens_per_second == pytest.approx(60 * 16 * 16 / result.seconds)
    assert result.metrics == evaluate(model, task)
    assert set(result.metrics) == {"accuracy", "loss"}
    assert train(make(task), task, eval_split=None, **QUICK).metrics == {}


def test_evaluation_is_of_all_examples_and_keeps_the_mode(task):
    model = make(task, drop_path=0.9).train()
    one, many = (evaluate(model, task, "test", batch_size=size) for size in (3, 100))
    assert model.training and one == pytest.approx(many, rel=1e-6)
    (batch,) = task.eval_batches(100, "test")
    with torch.no_grad():
        assert many["loss"] == pytest.approx(task.loss(model.eval()(batch.inputs), batch).item(), rel=1e-6)


def test_a_loss_that_is_not_finite_stops_with_a_status_and_finite_parameters(task):
    class Broken(type(task)):
        calls = 0

        def loss(self, logits, batch):
            self.calls += 1
            return super().loss(logits, batch) * (float("nan") if self.calls == 4 else 1.0)

    broken = Broken(16, 2, 16, eval_examples=20)
    model = make(task)
    result = train(model, broken, log_every=2, **QUICK)
    assert (result.status, result.steps, result.metrics) == ("diverged", 3, {})
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_time_limit_stops(task):
    result = train(make(task), task, time_limit=0.0, **QUICK)
    assert (result.status, result.steps) == ("time_limit", 0)
    assert set(result.metrics) == {"accuracy", "loss"}


def test_the_rate_rises_linearly_and_falls_by_half_a_cosine():
    rates = [rate_factor(step, 110, 10 / 110, "cosine") for step in range(110)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.001 + 0.999 * 0.5) and rates[-1] < 0.002
    assert all(after < before for before, after in itertools.pairwise(rates[10:]))
    assert {rate_factor(step, 110, 0.0, "constant") for step in range(110)} == {1.0}


def test_one_step_is_adamw_with_decay_on_matrices_alone(task):
    model = make(task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    exempt = model.position.table
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = next(task.train_batches(4, torch.Generator().manual_seed(0)))
    loss = task.loss(model(batch.inputs), batch)
    gradients = dict(zip(before, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    result = train(
        model, task, steps=1, batch_size=4, learning_rate=0.01, weight_decay=0.3, warmup=0.0, clip=norm / 2, eval_split=None
    )
    assert result.history[0].gradient_norm == pytest.approx(norm, rel=1e-5)
    assert result.history[0].loss == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        gradient = gradients[name] / 2  # clipped to half its norm
        decay = 0.3 if parameter.dim() > 1 and parameter is not exempt else 0.0
        step = gradient / (gradient.abs() + 1e-8)  # Adam's first step: both averages are the gradient itself
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * step
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)


def test_frozen_and_marked_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    model[1].weight._no_weight_decay = True
    (group,) = parameter_groups(model, 0.1)
    assert group["weight_decay"] == 0.0
    assert {id(p) for p in group["params"]} == {id(model[0].bias), *map(id, model[1].parameters())}
    assert make_optimizer(model, 0.1, 0.1).defaults["lr"] == 0.1
    assert device_of(model) == torch.device("cpu")


def test_auxiliary_losses_are_added_by_name():
    task = create_task("recall", seq_len=16, num_pairs=2, vocab_size=16, eval_examples=20)
    options = {"dim": 8, "depth": 2, "num_heads": 4, "mixer_options": {"num_shared": 1, "num_active": 2}}
    finals = []
    for auxiliary in (None, {"balance_loss": 0.0}, {"balance_loss": 5.0}):
        model = reference_model(task, "moh", **options).model
        train(model, task, auxiliary=auxiliary, eval_split=None, **QUICK)
        finals.append(state(model))
    assert equal(finals[0], finals[1]) and not equal(finals[0], finals[2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps, batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"warmup": 1.5}, "warmup"),
        ({"schedule": "linear"}, "schedule: expected one of"),
        ({"clip": 0.0}, "clip"),
        ({"log_every": 0}, "log_every"),
    ],
)
def test_bad_arguments(task, wrong, message):
    with pytest.raises(ValueError, match=message):
        train(make(task), task, **{**QUICK, **wrong})
