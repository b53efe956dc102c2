"""Leaky integrate-and-fire neurons by their equations."""

from __future__ import annotations

import pytest
import torch

from attnlab.mixers.parts.spikes import LIF, SpikingLinear
from mixers.spiking_oracle import disturb, fire


@pytest.mark.parametrize(
    "options", [{}, {"tau": 3.0, "threshold": 0.4, "alpha": 2.0}, {"surrogate": "arctan", "threshold": 0.5}, {"tau": 1}]
)
def test_neurons_are_their_equations(options) -> None:
    currents = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True) + 0.5
    ours = LIF(**options)(currents)
    theirs = fire(currents, **{"threshold": 1.0} | options)
    assert torch.equal(ours, theirs)
    assert 0.05 < float(ours.detach().mean()) < 0.95
    weight = torch.randn_like(ours)
    (a,), (b,) = (torch.autograd.grad((spikes * weight).sum(), currents, retain_graph=True) for spikes in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_threshold_itself_fires() -> None:
    assert LIF()(torch.full((1, 1), 2.0)).item() == 1.0
    assert LIF()(torch.full((1, 1), 1.999)).item() == 0.0


def test_a_layer_with_a_bias_can_be_fused() -> None:
    layer = SpikingLinear(6, 5, LIF(threshold=0.3), bias=True, dtype=torch.float64).eval()
    disturb(layer)
    x = torch.randn(3, 2, 7, 6, dtype=torch.float64)
    before, current = layer(x), layer.linear(x[0], (7,))
    layer.linear.fuse()
    torch.testing.assert_close(layer.linear(x[0], (7,)), current, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer(x), before)
