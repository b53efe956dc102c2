"""RCMHA by its definition: convolutions, four terms of the score, streams."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens


def _convolved(x: Tensor, conv) -> Tensor:
    """A head's projections, each channel with its own taps over this token and those before it."""
    rows = []
    for t in range(x.shape[1]):
        total = conv.bias + 0 * x[:, t]
        for back in range(conv.weight.shape[1]):
            if t - back >= 0:
                total = total + conv.weight[:, -1 - back] * x[:, t - back]
        rows.append(total)
    return torch.stack(rows, dim=1)


def _definition(mixer, x: Tensor) -> Tensor:
    d, n, reach = mixer.head_dim, x.shape[1], mixer.position.max_distance
    groups = mixer.num_heads // mixer.num_kv_heads
    heads = []
    for h in range(mixer.num_heads):
        cut, cut_kv = slice(h * d, (h + 1) * d), slice(h // groups * d, (h // groups + 1) * d)
        q = _convolved(mixer.q_proj(x)[..., cut], mixer.convs["q"])
        k = _convolved(mixer.k_proj(x)[..., cut_kv], mixer.convs["k"])
        v = _convolved(mixer.v_proj(x)[..., cut_kv], mixer.convs["v"])
        rows = []
        for i in range(n):
            scores = []
            for j in range(i + 1 if mixer.causal else n):
                r = max(-reach, min(reach, j - i)) + reach
                content = ((q[:, i] + mixer.query_bias[h]) * k[:, j]).sum(-1)
                place = q[:, i] @ mixer.position.table[h, r] + mixer.position.scalars[h, r]
                scores.append((content + place) / math.sqrt(d))
            weights = torch.stack(scores, dim=-1).exp()
            weights = weights / weights.sum(-1, keepdim=True)
            rows.append(sum(weights[:, j, None] * v[:, j] for j in range(weights.shape[1])))
        heads.append(torch.stack(rows, dim=1))
    return mixer.out_proj(torch.cat(heads, dim=-1))


@pytest.mark.tier("T2", "mixer:rcmha")
@pytest.mark.tier("T2", "position:relative")
@pytest.mark.parametrize(
    ("causal", "options"),
    [(True, {}), (False, {}), (True, {"num_kv_heads": 2, "conv_size": 1}), (False, {"max_distance": 2, "conv_size": 4})],
)
def test_definition(causal, options) -> None:
    mixer = build("rcmha", 8, 4, causal=causal, **{"max_distance": 9, **options})
    assert_defined_by(mixer, lambda x: _definition(mixer, x), tokens(6, 8))


def test_the_query_bias_does_not_meet_the_vectors_by_offset() -> None:
    mixer = create_mixer("rcmha", 8, 2, max_distance=4).double()
    with torch.no_grad():
        mixer.position.table.normal_()
        mixer.k_proj.weight.zero_()
        x = tokens(5, 8)
        before = mixer.mixing_matrix(x)
        mixer.query_bias.normal_()
        torch.testing.assert_close(mixer.mixing_matrix(x), before)


def test_padding_on_the_left_is_as_if_it_were_not_there() -> None:
    mixer = build("rcmha", 8, 2, causal=True, max_distance=9)
    x = tokens(7, 8)
    mask = torch.tensor([[False, False, True, True, True, True, True]]).expand(2, -1)
    torch.testing.assert_close(mixer(x, mask=mask)[:, 2:], mixer(x[:, 2:]))


def test_a_stream_needs_the_projections_before_it() -> None:
    mixer = build("rcmha", 8, 2, causal=True, max_distance=9)
    x = tokens(6, 8).detach()
    _, state = mixer.extend(x[:, :4], mixer.init_state(2))
    torch.testing.assert_close(mixer.extend(x[:, 4:], state)[0], mixer(x)[:, 4:])
    lost = state.replace(window_k=torch.zeros_like(state["window_k"]))
    assert not torch.allclose(mixer.extend(x[:, 4:], lost)[0], mixer(x)[:, 4:])


@pytest.mark.parametrize(("option", "value"), [("conv_size", 0), ("max_distance", 0), ("num_kv_heads", 3)])
def test_bad_options(option, value) -> None:
    with pytest.raises(ValueError, match=option):
        create_mixer("rcmha", 8, 2, **{option: value})
