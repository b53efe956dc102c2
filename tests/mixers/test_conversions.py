"""One view of them all: recurrences that papers show to be one another, held against each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnlab import Dynamics, create_mixer, list_mixers, mixer_info
from attnlab.core.errors import UnsupportedError
from attnlab.ops.delta_rule import delta_rule
from attnlab.ops.selective_scan import selective_scan
from mixers.definition import build, tokens


def test_the_delta_rule_is_a_product_of_householder_factors() -> None:
    """With unit keys and doubled strengths at their limit every transition reflects: it is orthogonal, with determinant -1."""
    k = F.normalize(torch.randn(1, 1, 6, 4, dtype=torch.float64), dim=-1)
    eye = torch.eye(4, dtype=torch.float64)
    _, product = delta_rule(
        k, k, torch.zeros_like(k), torch.full((1, 1, 6), 2.0, dtype=torch.float64), initial_state=eye[None, None]
    )
    expected = eye
    for key in k[0, 0]:
        expected = (eye - 2 * torch.outer(key, key)) @ expected
    torch.testing.assert_close(product[0, 0], expected)
    torch.testing.assert_close(expected @ expected.T, eye)
    assert float(torch.linalg.det(expected)) == pytest.approx(1.0)  # six reflections


def test_negative_eigenvalues_are_those_of_doubled_strengths() -> None:
    x = tokens(40, 12).detach()
    lowest = {}
    for doubled in (False, True):
        dynamics = build("delta_net", 12, 2, negative_eigenvalues=doubled).dynamics(x)
        eigenvalues = dynamics.eigenvalues().detach()
        assert float(eigenvalues.imag.abs().max()) < 1e-6  # each transition is symmetric
        assert float(eigenvalues.real.abs().max()) <= 1.0 + 1e-9
        lowest[doubled] = float(eigenvalues.real.min())
    assert lowest[False] >= -1e-9
    assert lowest[True] < -0.1


def test_linear_attention_is_a_state_space_model_without_decay() -> None:
    """Its dynamics run as the scan of Mamba with A = 0: keys' features are B, queries' over the denominator C."""
    mixer, x = build("linear", 8, 1, causal=True), tokens(12, 8).detach()
    dynamics = mixer.dynamics(x)
    assert torch.equal(dynamics.transition, torch.ones_like(dynamics.transition))
    _, _, v = mixer.project(x)
    A = torch.zeros(8, dynamics.state_size, dtype=torch.float64)
    y, _ = selective_scan(v[:, 0], torch.ones_like(v[:, 0]), A, dynamics.input[:, 0], dynamics.output[:, 0])
    torch.testing.assert_close(mixer.out_proj(y), mixer(x))
    torch.testing.assert_close(dynamics.run(v)[:, 0], y)


def test_mamba_forgets_by_its_step_and_softmax_by_its_denominator() -> None:
    x = torch.zeros(1, 30, 8, dtype=torch.float64)  # every token alike: equal scores, equal steps
    softmax = create_mixer("aaren", 8, 2, causal=True).double().dynamics(x).transition[0, 0, :, 0]
    torch.testing.assert_close(
        softmax[1:], torch.arange(1.0, 30.0, dtype=torch.float64) / torch.arange(2.0, 31.0, dtype=torch.float64)
    )
    mamba = create_mixer("mamba", 8, 1).double().dynamics(x).transition[0]
    torch.testing.assert_close(mamba[:, 0], mamba[:, -1])


def test_a_horizon_is_how_long_a_mode_lasts() -> None:
    half = torch.full((1, 1, 3, 2), 0.5, dtype=torch.float64)
    ones = torch.ones_like(half)
    torch.testing.assert_close(
        Dynamics(half, ones, ones).horizon(), torch.full((1, 1, 3), 1 / torch.log(torch.tensor(2.0)).item()).double()
    )
    assert torch.isinf(Dynamics(ones, ones, ones).horizon()).all()
    dense = torch.diag_embed(half)
    torch.testing.assert_close(Dynamics(dense, ones, ones).matrix(), Dynamics(half, ones, ones).matrix())


def test_a_skip_goes_past_the_state() -> None:
    zeros = torch.zeros(1, 1, 4, 2)
    matrix = Dynamics(zeros, zeros, zeros, torch.arange(4.0)[None, None]).matrix()
    assert torch.equal(matrix[0, 0], torch.diag(torch.arange(4.0)))


@pytest.mark.parametrize(
    "change", [{"output": torch.zeros(1, 1, 3, 3)}, {"transition": torch.zeros(1, 1, 3)}, {"skip": torch.zeros(1, 1)}]
)
def test_dynamics_that_do_not_fit(change) -> None:
    zeros = torch.zeros(1, 1, 3, 2)
    with pytest.raises(ValueError, match="expected"):
        Dynamics(**({"transition": zeros, "input": zeros, "output": zeros} | change))


@pytest.mark.parametrize("name", list_mixers(dynamics=True))
def test_dynamics_have_gradients(name) -> None:
    info = mixer_info(name)
    mixer = create_mixer(name, 8, 2, causal=True, **dict(info.example)).double()
    x = tokens(5, 8)
    leaves = [x, *mixer.parameters()]
    found = torch.autograd.grad(mixer.dynamics(x).matrix().square().sum(), leaves, allow_unused=True)
    gradients = [gradient for gradient in found if gradient is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 0


def test_who_is_no_linear_recurrence_says_so() -> None:
    with pytest.raises(UnsupportedError, match="dynamics"):
        create_mixer("softmax", 8, 2, causal=True).dynamics(torch.zeros(1, 3, 8))
