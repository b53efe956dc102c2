"""Linear attention with a choice of decays, by its definition, and what it is with other names."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from attnlab.mixers.linear.gated_linear import DECAYS
from attnlab.ops.selective_scan import selective_scan
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS = 8, 2


def _decay(mixer, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The decay (h, d) of one token and the weight of its write (h, 1)."""
    one = torch.ones(HEADS, 1, dtype=x.dtype)
    part = mixer.decay
    if kind == "channel":
        return torch.sigmoid(part.up(part.down(x)).view(HEADS, -1)) ** (1 / 16), one
    if kind == "step":
        step = torch.log1p(torch.exp(part.proj(x) + part.bias))[:, None]
        return torch.exp(-step * part.A_log.exp()[:, None]).expand(-1, mixer.key_dim), step
    return torch.exp(-torch.log1p(torch.exp(part.rate))).expand(-1, mixer.key_dim), one


def _definition(mixer, x: Tensor, kind: str) -> Tensor:
    out = []
    for example in x:
        state, rows = torch.zeros(HEADS, mixer.key_dim, mixer.value_dim, dtype=x.dtype), []
        for token in example:
            q, k, v = (layer(token).view(HEADS, -1) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            q, k = (F.relu(t) if mixer.activation == "relu" else t for t in (q, k))
            decay, weight = _decay(mixer, token, kind)
            state = decay[..., None] * state + (weight * k)[..., None] * v[:, None]
            read = (q[..., None] * state).sum(1) / math.sqrt(mixer.key_dim)
            read = read / (read.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.out_norm.weight
            gate = mixer.g_proj(token)
            rows.append(mixer.out_proj(read.flatten() * gate * torch.sigmoid(gate)))
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.tier("T2", "mixer:gated_linear")
@pytest.mark.parametrize("options", [{}, {"activation": "relu", "expand_k": 0.5, "expand_v": 2.0}], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_definition(decay, options) -> None:
    mixer = build("gated_linear", DIM, HEADS, decay=decay, **options)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, decay), tokens(7, DIM))


def test_short_convolutions_are_those_of_delta_net() -> None:
    mixer = create_mixer("gated_linear", DIM, HEADS, conv_size=3).double()
    x = tokens(9, DIM).detach()
    whole = mixer(x)
    y, state = mixer.extend(x[:, :4], mixer.init_state(2))
    z, _ = mixer.extend(x[:, 4:], state)
    torch.testing.assert_close(torch.cat((y, z), dim=1), whole)
    assert set(state) == {"memory", "window_q", "window_k", "window_v"}


def test_one_head_with_steps_is_a_state_space_model() -> None:
    """Linear attention as an SSM: with one decay for all states the scan of Mamba gives the same, keys as B, queries as C."""
    mixer = build("gated_linear", DIM, 1, decay="step")
    x = tokens(12, DIM).detach()
    steps = mixer._whole(x, None)
    delta = mixer.decay.steps(x)[:, 0]
    keys = steps.k[:, 0] / delta
    A = -mixer.decay.A_log.exp().expand(DIM, DIM)
    y, _ = selective_scan(steps.v[:, 0], delta.expand(-1, -1, DIM), A, keys, steps.q[:, 0] * steps.scale)
    torch.testing.assert_close(steps.run()[0][:, 0], y)


@pytest.mark.parametrize("decay", DECAYS)
def test_decays_are_between_0_and_1_and_differ_by_token_where_they_should(decay) -> None:
    mixer, x = create_mixer("gated_linear", 16, 4, decay=decay), torch.randn(1, 5, 16)
    log = mixer.decay(x)
    assert log.shape == (1, 4, 5, 4 if decay.endswith("channel") else 1)
    assert (log < 0).all()
    assert (log[:, :, 0] == log[:, :, 1]).all().item() is decay.startswith("learned")


@pytest.mark.parametrize(("option", "value"), [("decay", "none"), ("activation", "gelu"), ("expand_k", 0.4)])
def test_bad_options(option, value) -> None:
    with pytest.raises(ValueError, match=option):
        create_mixer("gated_linear", DIM, HEADS, **{option: value})
