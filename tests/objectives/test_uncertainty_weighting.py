"""Uncertainty weighting by its definition."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab.objectives import create_objective


@pytest.mark.tier("T2", "objective:uncertainty_weighting")
def test_definition() -> None:
    objective = create_objective("uncertainty_weighting", num_losses=3).double()
    with torch.no_grad():
        objective.weight.copy_(torch.tensor([0.3, -0.7, 1.1]))
    losses = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.5, 2.0, 1.5)]
    total = objective(losses)
    weights = objective.weight.tolist()
    pairs = list(zip(weights, losses, strict=True))
    assert float(total.detach()) == pytest.approx(0.5 * sum(math.exp(-w) * float(loss.detach()) + w for w, loss in pairs))
    total.backward()
    for i, (w, loss) in enumerate(pairs):
        assert float(loss.grad) == pytest.approx(0.5 * math.exp(-w))
        assert float(objective.weight.grad[i]) == pytest.approx(0.5 * (1 - math.exp(-w) * float(loss.detach())))


def test_the_best_weight_is_the_log_of_the_loss() -> None:
    objective = create_objective("uncertainty_weighting", num_losses=2).double()
    with torch.no_grad():
        objective.weight.copy_(torch.tensor([0.2, 3.0], dtype=torch.float64).log())
    objective([torch.tensor(0.2, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)]).backward()
    assert float(objective.weight.grad.abs().max()) < 1e-12


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="num_losses"):
        create_objective("uncertainty_weighting", num_losses=0)
    objective = create_objective("uncertainty_weighting", num_losses=2)
    with pytest.raises(ValueError, match="recorded"):
        objective([torch.tensor(1.0)])
    with pytest.raises(ValueError, match="mask"):
        objective([torch.tensor(1.0)] * 2, mask=torch.ones(1, 2, dtype=torch.bool))
