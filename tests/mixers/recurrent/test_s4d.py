"""S4D by its definition: a recurrence a channel, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import check, create_mixer
from mixers.definition import assert_defined_by, build, tokens


def _definition(mixer, u: Tensor) -> Tensor:
    a = -torch.exp(mixer.A_log) + 1j * mixer.A_imag
    step = torch.exp(mixer.log_step)
    if mixer.discretization == "zoh":
        decay = torch.exp(step * a)
        write = (decay - 1) / a
    else:
        decay, write = (1 + step * a / 2) / (1 - step * a / 2), step / (1 - step * a / 2)
    read = mixer.C[..., 0] + 1j * mixer.C[..., 1]
    h, rows = torch.zeros(u.shape[0], *a.shape, dtype=a.dtype), []
    for t in range(u.shape[1]):
        h = decay * h + write * u[:, t, :, None]
        v = 2 * (read * h).sum(-1).real + mixer.D * u[:, t]
        v = 0.5 * v * (1 + torch.erf(v / 2**0.5))
        y = mixer.out_proj(v)
        rows.append(y[:, : u.shape[2]] * torch.sigmoid(y[:, u.shape[2] :]) if mixer.glu else y)
    return torch.stack(rows, 1)


@pytest.mark.tier("T2", "mixer:s4d")
@pytest.mark.parametrize(
    "options", [{}, {"discretization": "bilinear", "glu": False}, {"init": "inv", "state_dim": 1}], ids=["lin", "bilinear", "inv"]
)
def test_s4d(options) -> None:
    mixer = build("s4d", 6, 1, **({"state_dim": 3} | options))
    for n in (1, 7):
        assert_defined_by(mixer, lambda u: _definition(mixer, u), tokens(n, 6))


def test_contract_of_the_bilinear_rule() -> None:
    laws = ["streaming_*", "combined_pieces", "dynamics*", "mixing_matrix*", "padding_*", "precision_*"]
    report = check("s4d", options={"discretization": "bilinear", "init": "inv", "glu": False}, only=laws)
    assert report.passed, report


def test_convolution_and_recurrence_agree_over_hundreds_of_tokens() -> None:
    mixer = create_mixer("s4d", 4).double()
    x = torch.randn(1, 300, 4, dtype=torch.float64)
    with torch.no_grad():
        state, rows = mixer.init_state(1), []
        for token in x.split(1, dim=1):
            y, state = mixer.extend(token, state)
            rows.append(y)
        whole, after = mixer.extend(x, mixer.init_state(1))
        torch.testing.assert_close(torch.cat(rows, 1), mixer(x), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(whole, mixer(x), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(after["ssm"], state["ssm"], rtol=1e-9, atol=1e-11)


def test_initial_rates() -> None:
    n = torch.arange(3.0)
    expected = {
        "lin": (torch.full((3,), 0.5), math.pi * n),
        "inv": (torch.full((3,), 0.5), 6 / math.pi * (6 / (2 * n + 1) - 1)),
        "real": (n + 1, torch.zeros(3)),
    }
    for init, (decay, frequency) in expected.items():
        mixer = create_mixer("s4d", 2, init=init, state_dim=3)
        torch.testing.assert_close(mixer.A_log.exp().detach(), decay.expand(2, -1))
        torch.testing.assert_close(mixer.A_imag.detach(), frequency.expand(2, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"state_dim": 0}, "state_dim"), ({"init": "random"}, "init"), ({"discretization": "euler"}, "discretization")],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("s4d", 12, **options)
