"""What S4D and S5 share: rules of discretisation."""

from __future__ import annotations

import pytest
import torch

from attnlab.mixers.recurrent.time_invariant import discretized, initial_steps


def test_zero_order_hold_solves_the_equation_for_a_constant_input() -> None:
    rate, step = torch.tensor([-0.5 + 3j, -2 + 0j], dtype=torch.complex128), torch.tensor(0.3, dtype=torch.float64)
    log_decay, write = discretized(rate, step, "zoh")
    h = start = torch.tensor([1 + 1j, 2 + 0j], dtype=torch.complex128)
    for _ in range(1000):  # h' = A h + 1 by the midpoint rule, whose error is of second order
        half = h + step / 2000 * (rate * h + 1)
        h = h + step / 1000 * (rate * half + 1)
    torch.testing.assert_close(log_decay.exp() * start + write, h, rtol=1e-6, atol=0.0)


def test_bilinear_rule_is_the_trapezoid() -> None:
    rate, step = torch.tensor([-0.5 + 3j], dtype=torch.complex128), torch.tensor(0.3, dtype=torch.float64)
    log_decay, write = discretized(rate, step, "bilinear")
    h, u = 1 + 1j, 0.7
    after = log_decay.exp() * h + write * u
    torch.testing.assert_close(after, h + step * (rate * (h + after) / 2 + u), rtol=1e-14, atol=0.0)


def test_steps_lie_between_their_bounds() -> None:
    steps = initial_steps((500,), 1e-3, 0.1).exp()
    assert 1e-3 * 0.999 <= float(steps.min()) < 2e-3
    assert 0.05 < float(steps.max()) <= 0.1 * 1.001
    with pytest.raises(ValueError, match="dt_min"):
        initial_steps((2,), 0.1, 0.01)
