"""Mamba by its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens


@pytest.mark.tier("T2", "mixer:mamba")
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "conv_bias": False, "dt_rank": 3, "conv_size": 2}], ids=["default", "options"]
)
def test_mamba(options) -> None:
    mixer = build("mamba", 8, 1, state_dim=3, **options)

    def definition(u: Tensor) -> Tensor:
        x, z = mixer.in_proj(u).split(16, -1)
        weight, width = mixer.conv.weight, mixer.conv.weight.shape[1]
        padded = F.pad(x, (0, 0, width - 1, 0))
        x = sum(weight[:, s] * padded[:, s : s + u.shape[1]] for s in range(width))
        x = F.silu(x if mixer.conv.bias is None else x + mixer.conv.bias)
        r, b, c = mixer.x_proj(x).split([mixer.dt_rank, 3, 3], -1)
        dt = F.softplus(mixer.dt_proj(r))
        a = -torch.exp(mixer.A_log)
        h = torch.zeros(u.shape[0], 16, 3, dtype=u.dtype)
        rows = []
        for t in range(u.shape[1]):
            h = torch.exp(dt[:, t, :, None] * a) * h + dt[:, t, :, None] * b[:, t, None, :] * x[:, t, :, None]
            rows.append((h * c[:, t, None, :]).sum(-1) + mixer.D * x[:, t])
        return mixer.out_proj(torch.stack(rows, 1) * F.silu(z))

    assert_defined_by(mixer, definition, tokens(7, 8))


def test_mamba_initialisation() -> None:
    mixer = create_mixer("mamba", 32, state_dim=4)
    torch.testing.assert_close(-mixer.A_log.exp(), -torch.arange(1.0, 5.0).expand(64, -1))
    step = F.softplus(mixer.dt_proj.bias.detach())
    assert float(step.min()) >= 1e-3 * 0.999
    assert float(step.max()) <= 0.1 * 1.001
    assert all(getattr(p, "_no_weight_decay", False) for p in (mixer.A_log, mixer.D, mixer.dt_proj.bias))
    assert mixer.dt_rank == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mamba", {"state_dim": 0}, "state_dim"),
    ],
)
def test_bad_options(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, 3, **options)
