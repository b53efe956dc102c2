"""What every task promises."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab.core.errors import UnknownNameError, UnsupportedError
from attnlab.tasks import IGNORE, create_task, list_tasks, reference_model, task_info, tasks

NAMES = [name for name in list_tasks() if not tasks.get(name).factory.source]
OTHER = {"stdlib_text": {"max_bytes": 1_200_000}, "digits": {"patch": 4}}
"""Options that change the data of those that have no seed."""


@pytest.fixture(params=NAMES)
def task(request):
    return create_task(request.param, **tasks.get(request.param).factory.small)


def equal(first, second):
    """Whether two tensors are the same, numbers that are not asked for included."""
    return torch.equal(first.nan_to_num(1e30), second.nan_to_num(1e30))


def same(first, second):
    return all(equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


def test_the_registered_tasks():
    assert {"digits", "recall", "stdlib_text"} <= set(NAMES)
    assert "num_pairs" in {option.name for option in task_info("recall").options}
    with pytest.raises(UnknownNameError, match="'recall'"):
        create_task("recal")
    with pytest.raises(UnknownNameError, match="'num_pairs'"):
        create_task("recall", num_pair=3)


def test_the_generator_is_the_only_state_of_training_batches(task):
    generator = torch.Generator().manual_seed(1)
    batches = task.train_batches(3, generator)
    next(batches)
    saved = generator.get_state()
    expected = [next(batches), next(batches)]
    restored = torch.Generator()
    restored.set_state(saved)
    again = task.train_batches(3, restored)
    assert all(same(batch, next(again)) for batch in expected)
    assert not same(*expected)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_examples_are_fixed_whatever_the_batch_size(task, split):
    small, large = list(task.eval_batches(7, split)), list(task.eval_batches(10_000, split))
    assert len(large) == 1
    joined = [torch.cat(parts) for parts in zip(*(batch.tensors() for batch in small), strict=True)]
    assert all(equal(a, b) for a, b in zip(joined, large[0].tensors(), strict=True))
    next(task.train_batches(2, torch.Generator().manual_seed(0)))
    assert same(next(task.eval_batches(10_000, split)), large[0])


def test_the_splits_differ(task):
    first, second = next(task.eval_batches(5, "valid")), next(task.eval_batches(5, "test"))
    assert not same(first, second)


def test_the_fingerprint_follows_the_data(task):
    name = task.info.name
    other = OTHER.get(name, {"seed": 1})
    assert task.fingerprint() == create_task(name, **task.small).fingerprint()
    assert task.fingerprint() != create_task(name, **{**task.small, **other}).fingerprint()
    assert len(task.fingerprint()) == 64


def test_the_reference_model_fits_the_task(task):
    budget = task.default_budget
    match = reference_model(task, "softmax")
    batch = next(task.train_batches(2, torch.Generator().manual_seed(0)))
    logits = batch.through(match.model)
    task.loss(logits, batch).backward()
    assert all(parameter.grad is not None for parameter in match.model.parameters())
    assert abs(match.parameters - budget.parameters) <= 0.02 * budget.parameters
    assert len(match.model.blocks) == budget.depth
    assert list(budget.learning_rates) == sorted(budget.learning_rates) and budget.steps > 0


def test_metrics_of_a_perfect_and_a_blind_model(task):
    batch = next(task.eval_batches(6))
    blind = batch.through(reference_model(task, "softmax", dim=8, depth=1).model).detach() * 0.0
    if batch.targets.is_floating_point():
        asked = ~batch.targets.isnan()
        for logits, squares in ((batch.targets.nan_to_num(), 0.0), (blind, batch.targets[asked].square().mean().item())):
            total, count = task.metrics(logits, batch)[task.metric]
            assert count == asked.sum() and total / count == pytest.approx(squares)
            assert task.loss(logits, batch).item() == pytest.approx(squares)
        return
    classes = blind.shape[-1]
    perfect = torch.nn.functional.one_hot(batch.targets.clamp(min=0), classes) * 100.0
    (total, count), (nats, _) = task.metrics(perfect, batch)[task.metric], task.metrics(blind, batch)["loss"]
    assert count == (batch.targets != IGNORE).sum() and total / count == pytest.approx(float(task.higher_is_better), abs=1e-6)
    assert nats / count == pytest.approx(math.log(classes), rel=1e-5)
    assert task.loss(blind, batch).item() == pytest.approx(math.log(classes), rel=1e-5)


def test_baselines_are_in_the_primary_metric(task):
    values = task.baselines()
    assert len(values) >= 2
    assert all(0 < value < (1 if task.higher_is_better else 8.01) for value in values.values())


def test_the_reference_model_is_drawn_from_its_seed(task):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, other = (reference_model(task, "softmax", dim=8, depth=1, seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_only_a_size_or_a_budget_is_given():
    task = create_task("digits")
    with pytest.raises(ValueError, match="dim, parameters: expected one of them"):
        reference_model(task, "softmax", dim=8, parameters=1000)
    with pytest.raises(UnsupportedError, match="'pooling' does not support a causal language model"):
        reference_model(create_task("recall"), "pooling")
