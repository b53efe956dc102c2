"""S5 by its definition: one recurrence for all channels, token by token."""

from __future__ import annotations

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
    b, c = (m[..., 0] + 1j * m[..., 1] for m in (mixer.B, mixer.C))
    h, rows = torch.zeros(u.shape[0], len(a), dtype=a.dtype), []
    for t in range(u.shape[1]):
        h = decay * h + (u[:, t].to(b.dtype) @ b.mT) * write
        v = 2 * (h @ c.mT).real + mixer.D * u[:, t]
        v = 0.5 * v * (1 + torch.erf(v / 2**0.5))
        rows.append(v * torch.sigmoid(mixer.gate(v)))
    return torch.stack(rows, 1)


@pytest.mark.tier("T2", "mixer:s5")
@pytest.mark.parametrize("options", [{}, {"discretization": "bilinear", "blocks": 2}], ids=["zoh", "bilinear"])
def test_s5(options) -> None:
    mixer = build("s5", 6, 1, state_dim=4, **options)
    for n in (1, 11):
        assert_defined_by(mixer, lambda u: _definition(mixer, u), tokens(n, 6))


def test_contract_of_the_bilinear_rule() -> None:
    laws = ["streaming_*", "combined_pieces", "padding_*", "causality_gradient", "precision_*"]
    report = check("s5", options={"discretization": "bilinear", "blocks": 2}, only=laws)
    assert report.passed, report


def test_it_begins_with_the_normal_part_of_hippo() -> None:
    mixer = create_mixer("s5", 5, state_dim=6, blocks=2, dtype=torch.float64)
    q = torch.arange(6, dtype=torch.float64) + 0.5
    normal = torch.outer(q, q).sqrt()
    normal = -0.5 * torch.eye(6) - normal.tril(-1) + normal.triu(1)
    values = torch.linalg.eigvals(normal)
    expected = values[values.imag > 0].imag.sort().values
    for part in mixer.A_imag.detach().view(2, 3):
        torch.testing.assert_close(part.sort().values, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixer.A_log.exp().detach(), torch.full((6,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"state_dim": 0}, "state_dim"), ({"blocks": 3}, "blocks"), ({"discretization": "euler"}, "discretization")],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("s5", 12, **options)
