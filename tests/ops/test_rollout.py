"""Attention rollout by its definition."""

from __future__ import annotations

import pytest
import torch

from attnlab.ops.maps.rollout import rollout


@pytest.mark.parametrize("identity", [0.5, 0.2])
def test_later_layers_multiply_from_the_left(identity) -> None:
    maps = [torch.rand(2, 3, 4, 4, dtype=torch.float64).softmax(-1).requires_grad_() for _ in range(3)]
    ours = rollout(maps, identity=identity)
    for b in range(2):
        steps = []
        for one in maps:
            mean = (one[b, 0] + one[b, 1] + one[b, 2]) / 3
            steps.append(torch.stack([(1 - identity) * mean[i] + identity * torch.eye(4, dtype=mean.dtype)[i] for i in range(4)]))
        expected = steps[2] @ steps[1] @ steps[0]
        torch.testing.assert_close(ours[b], expected, rtol=1e-12, atol=1e-12)
        assert float((ours[b] - steps[0] @ steps[1] @ steps[2]).detach().abs().max()) > 1e-4
    torch.testing.assert_close(ours.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    assert all(bool(g.any()) for g in torch.autograd.grad(ours.square().sum(), maps))


def test_bad_input_is_named() -> None:
    square = torch.rand(1, 1, 3, 3)
    with pytest.raises(ValueError, match="maps"):
        rollout([])
    with pytest.raises(ValueError, match="identity"):
        rollout([square], identity=1.5)
