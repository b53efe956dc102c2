"""The Pearson loss by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab.objectives import create_objective


def _definition(x: Tensor, y: Tensor, mask: Tensor, eps: float) -> Tensor:
    losses = []
    for e in range(len(x)):
        real = [i for i in range(x.shape[1]) if mask[e, i]]
        a, b = ([part[e, i, c] for i in real for c in range(x.shape[2])] for part in (x, y))
        mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
        together = sum((s - mean_a) * (t - mean_b) for s, t in zip(a, b, strict=True))
        lengths = [torch.sqrt(sum((s - mean) ** 2 for s in part)) for part, mean in ((a, mean_a), (b, mean_b))]
        losses.append((1 - together / (math.prod(lengths) + eps)) / 2)
    return sum(losses) / len(losses)


@pytest.mark.tier("T2", "objective:pearson")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_pearson(masked, eps) -> None:
    x, y = (torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.ones(3, 5, dtype=torch.bool)
    if masked:
        mask[0, 3:] = mask[1, 0] = False
    ours = create_objective("pearson", eps=eps)([x, y], mask=mask if masked else None)
    theirs = _definition(x, y, mask, eps)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0.0)
    for a, b in zip(torch.autograd.grad(ours, (x, y)), torch.autograd.grad(theirs, (x, y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_gain_and_offset_make_no_difference_and_the_limits_are_0_and_1() -> None:
    pearson = create_objective("pearson", eps=0.0)
    x, y = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(pearson([3 * x - 7, y]), pearson([x, y]))
    torch.testing.assert_close(pearson([2 * y + 1, y]), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(pearson([-y, y]), torch.ones((), dtype=torch.float64))


def test_refusals() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="eps: expected at least 0"):
        create_objective("pearson", eps=-1.0)
    with pytest.raises(ValueError, match="recorded: expected prediction and target"):
        create_objective("pearson")([x])
    with pytest.raises(ValueError, match="mask: expected tokens"):
        create_objective("pearson")([x, x], mask=torch.ones(2, 4, dtype=torch.bool))
