from __future__ import annotations

import pytest
import torch

from attnlab.tasks import create_task
from attnlab.tasks.icl.estimators import (
    Prompt,
    approximate_loss,
    debiased_gradient_step,
    gradient_step,
    optimal_mu,
    ridge,
    ridge_loss_limit,
    softmax_estimate,
)

D = torch.float64


@pytest.fixture
def prompt():
    return Prompt(torch.randn(4, 9, 3, dtype=D), torch.randn(4, 9, dtype=D), torch.randn(4, 3, dtype=D))


def test_estimators_are_their_formulas(prompt):
    omega, mu = torch.tensor([0.4, -0.7], dtype=D), torch.tensor([1.2, 0.3], dtype=D)
    for i, (x, y, q) in enumerate(zip(*prompt, strict=True)):
        assert gradient_step(prompt, 0.5)[i].item() == pytest.approx(0.5 / 9 * sum(y[t] * (x[t] @ q) for t in range(9)).item())
        centred = 0.5 / 9 * (y @ x @ q - y.sum() * (x.mean(0) @ q))
        assert debiased_gradient_step(prompt, 0.5)[i].item() == pytest.approx(centred.item())
        heads = sum(m * (y @ torch.softmax(o * (x @ q), 0)) for o, m in zip(omega, mu, strict=True))
        assert softmax_estimate(prompt, omega, mu)[i].item() == pytest.approx(heads.item())
        beta = torch.linalg.inv(x.T @ x + 0.3 * torch.eye(3, dtype=D)) @ x.T @ y
        assert ridge(prompt, 0.3)[i].item() == pytest.approx((beta @ q).item())


def test_two_small_heads_of_opposite_sign_are_a_debiased_step(prompt):
    omega = torch.tensor([1e-4, -1e-4], dtype=D)
    heads = softmax_estimate(prompt, omega, torch.tensor([1e4, -1e4], dtype=D))
    torch.testing.assert_close(heads, debiased_gradient_step(prompt, 2.0), rtol=1e-3, atol=1e-3)


def test_the_best_mu_is_a_minimum():
    omega = torch.tensor([0.3, -0.2], dtype=D)
    mu = optimal_mu(omega, 5, 40, 0.1).requires_grad_()
    loss = approximate_loss(omega, mu, 5, 40, 0.1)
    (slope,) = torch.autograd.grad(loss, mu)
    assert slope.abs().max() < 1e-9 and 0.1 < loss.item() < 1.1


def test_ridge_comes_to_its_limit():
    task = create_task("in_context_regression", dim=40, num_examples=80, eval_examples=2000)
    assert task.baselines()["ridge"] == pytest.approx(ridge_loss_limit(0.5, 0.1), rel=0.1)


def test_sequences_are_linear_functions():
    task = create_task("in_context_regression", dim=3, num_examples=10, noise_variance=0.0, eval_examples=50)
    values = task.baselines()
    assert values["ridge"] < 1e-6 < values["gradient_step"] < values["zero"] == pytest.approx(1.0, rel=0.6)
    batch = task.examples("valid")
    assert (batch.inputs[:, -1, 3] == 0).all() and batch.targets[:, :-1].isnan().all()
    assert not batch.targets[:, -1].isnan().any()


def test_correlated_inputs_have_the_covariance():
    task = create_task("in_context_regression", correlation=0.5, eval_examples=4000)
    x = task.examples("valid").inputs[..., :3].flatten(0, 1)
    expected = torch.tensor([[1.0, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 1.0]])
    assert (x.T.cov() - expected).abs().max() < 0.03


def test_two_responses_read_their_own_coordinates():
    task = create_task("in_context_regression", dim=4, num_examples=12, response_dim=2, noise_variance=0.0, eval_examples=30)
    assert task.model_options["num_outputs"] == 2 and task.baselines()["ridge"] < 1e-6
    for k, (prompt, truth) in enumerate(task.prompts("valid")):
        own = slice(0, 2) if k == 0 else slice(2, 4)
        cut = Prompt(prompt.x[..., own], prompt.y, prompt.query[:, own])
        torch.testing.assert_close(ridge(cut, 0.0), truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim, num_examples: expected positive integers"),
        ({"correlation": 1.0}, "noise_variance, correlation"),
        ({"response_dim": 4}, "response_dim: expected 1 to 3, or None, got 4"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_task("in_context_regression", **options)
