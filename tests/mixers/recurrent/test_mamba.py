"""Mamba by its definition, with all options of its scan."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import Mixer, check, create_mixer
from mixers.definition import assert_defined_by, build, tokens

STATES = 3
OPTIONS = {
    "default": {},
    "sizes": {"bias": True, "conv_bias": False, "dt_rank": 3, "conv_size": 2},
    "groups": {"groups": 4, "skip": False},
    "complex": {"complex_states": True, "groups": 2},
    "step_alone": {"selective": ("delta",)},
    "maps_alone": {"selective": ("B", "C")},
    "none": {"selective": (), "complex_states": True},
    "write_alone": {"selective": ("B",), "groups": 2},
}


def _complex(mixer: Mixer, values: Tensor) -> Tensor:
    """Pairs (real, imaginary) beside each other as complex numbers, as the card says."""
    return values[..., 0::2] + 1j * values[..., 1::2] if mixer.ssm.complex_states else values


def _weights(mixer: Mixer, x: Tensor) -> dict[str, Tensor | None]:
    """Delta (b n e), and B and C of each channel and token (b n e s), from the rows of the one projection."""
    ssm, e, start = mixer.ssm, x.shape[-1], 0
    found: dict[str, Tensor | None] = {"delta": F.softplus(ssm.dt_bias).expand_as(x) if ssm.dt_bias is not None else None}
    rows = 0 if ssm.x_proj is None else ssm.x_proj.weight
    if ssm.dt_proj is not None:
        start = ssm.dt_proj.in_features
        found["delta"] = F.softplus(x @ rows[:start].mT @ ssm.dt_proj.weight.mT + ssm.dt_proj.bias)
    width = STATES * (2 if ssm.complex_states else 1)
    for name in ("B", "C"):
        constant = getattr(ssm, name)
        if constant is not None:
            found[name] = _complex(mixer, constant.reshape(e, width)).expand(*x.shape, STATES)
            continue
        by_channel = []
        for channel in range(e):
            group = channel // (e // ssm.groups)
            first = start + group * width
            by_channel.append(_complex(mixer, x @ rows[first : first + width].mT))
        start += ssm.groups * width
        found[name] = torch.stack(by_channel, 2)
    return found


def _definition(mixer: Mixer, u: Tensor) -> Tensor:
    x, z = mixer.in_proj(u).split(16, -1)
    weight, width = mixer.conv.weight, mixer.conv.weight.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    x = sum(weight[:, s] * padded[:, s : s + u.shape[1]] for s in range(width))
    x = F.silu(x if mixer.conv.bias is None else x + mixer.conv.bias)
    given, ssm = _weights(mixer, x), mixer.ssm
    a = -torch.exp(ssm.A_log) + (0 if ssm.A_imag is None else 1j * ssm.A_imag)
    h, rows = torch.zeros(1), []
    for t in range(u.shape[1]):
        step = given["delta"][:, t, :, None]
        h = torch.exp(step * a) * h + step * given["B"][:, t] * x[:, t, :, None]
        y = (h * given["C"][:, t]).sum(-1)
        y = 2 * y.real if ssm.complex_states else y
        rows.append(y if ssm.D is None else y + ssm.D * x[:, t])
    return mixer.out_proj(torch.stack(rows, 1) * F.silu(z))


@pytest.mark.tier("T2", "mixer:mamba")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_mamba(options) -> None:
    mixer = build("mamba", 8, 1, state_dim=STATES, **options)
    assert_defined_by(mixer, lambda u: _definition(mixer, u), tokens(7, 8))


@pytest.mark.parametrize("name", ["groups", "complex", "none", "write_alone"])
def test_contract_of_the_options(name) -> None:
    laws = ["padding_*", "causality_*", "streaming_*", "mixing_matrix*", "dynamics*", "precision_*", "meta_device", "packed*"]
    report = check("mamba", options={"state_dim": STATES, **OPTIONS[name]}, only=laws)
    assert report.passed, report


def test_initialisation() -> None:
    mixer = create_mixer("mamba", 32, state_dim=4)
    ssm = mixer.ssm
    torch.testing.assert_close(-ssm.A_log.exp(), -torch.arange(1.0, 5.0).expand(64, -1))
    step = F.softplus(ssm.dt_proj.bias.detach())
    assert float(step.min()) >= 1e-3 * 0.999
    assert float(step.max()) <= 0.1 * 1.001
    assert all(getattr(p, "_no_weight_decay", False) for p in (ssm.A_log, ssm.D, ssm.dt_proj.bias))
    assert ssm.dt_proj.in_features == 2
    assert 0.5 * 2**-0.5 < float(ssm.dt_proj.weight.detach().abs().max()) <= 2**-0.5


def test_initial_steps_and_rates_as_asked() -> None:
    ssm = create_mixer("mamba", 8, dt_init="constant", dt_scale=0.5, dt_rank=4, complex_states=True, state_dim=3).ssm
    torch.testing.assert_close(ssm.dt_proj.weight.detach(), torch.full((16, 4), 0.25))
    expected = torch.complex(torch.full((16, 3), -0.5), torch.pi * torch.arange(3.0).expand(16, -1))
    torch.testing.assert_close(ssm.rates.detach(), expected)
    floored = create_mixer("mamba", 8, dt_init_floor=0.5).ssm.dt_proj.bias.detach()
    torch.testing.assert_close(F.softplus(floored), torch.full((16,), 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 0}, "state_dim"),
        ({"conv_size": 0}, "conv_size"),
        ({"groups": 5}, "groups: expected a divisor"),
        ({"dt_init": "zero"}, "dt_init"),
        ({"dt_min": 0.2}, "dt_min, dt_max"),
        ({"selective": ("A",)}, "selective"),
        ({"selective": "B"}, "selective"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("mamba", 12, 3, **options)
