"""Sliding windows and windows by their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens


def _masked_softmax_attention(mixer, x: Tensor, allowed: Tensor) -> Tensor:
    heads = []
    for q, k, v in zip(*(split_heads(p(x), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)), strict=True):
        logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        heads.append(torch.softmax(logits.masked_fill(~allowed, float("-inf")), -1) @ v)
    return mixer.out_proj(torch.cat(heads, -1))


@pytest.mark.tier("T2", "mixer:sliding_window")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 0), (4, 2), (50, 3)])
def test_sliding_window(causal, window, sinks) -> None:
    mixer = build("sliding_window", causal=causal, window=window, num_sinks=sinks)
    n = 13
    allowed = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            near = i - window < j <= i if causal else abs(i - j) <= window // 2
            allowed[i, j] = near or (j < sinks and (not causal or j <= i) and j <= i + (0 if causal else window // 2))
    assert_defined_by(mixer, lambda x: _masked_softmax_attention(mixer, x, allowed), tokens(n))


def test_sliding_window_state_is_bounded() -> None:
    mixer = create_mixer("sliding_window", 8, 2, causal=True, window=4, num_sinks=2)
    state = mixer.init_state(1)
    for _ in range(12):
        _, state = mixer.extend(torch.randn(1, 1, 8), state)
    assert state["k"].shape == (1, 2, 5, 4)
    assert int(state["position"]) == 12


@pytest.mark.tier("T2", "mixer:window")
@pytest.mark.parametrize("grid", [(4, 6), (5, 5), (7,), (2, 3, 4)])
def test_window(grid) -> None:
    mixer = build("window", window=2)
    n = math.prod(grid)
    cells = torch.stack(torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij"), -1).reshape(n, -1) // 2
    allowed = (cells[:, None] == cells[None]).all(-1)
    assert_defined_by(mixer, lambda x: _masked_softmax_attention(mixer, x, allowed), tokens(n), grid=grid)


def test_zero_tokens_at_the_border_take_part() -> None:
    masked, zeros = (build("window", window=3, border=border, qkv_bias=True) for border in ("masked", "zero_tokens"))
    zeros.load_state_dict(masked.state_dict())
    x = tokens(4)
    padded = F.pad(x.view(2, 2, 2, 12), (0, 0, 0, 1, 0, 1)).view(2, 9, 12)
    torch.testing.assert_close(zeros(x, grid=(2, 2)), masked(padded, grid=(3, 3))[:, [0, 1, 3, 4]])
    assert not torch.allclose(zeros(x, grid=(2, 2)), masked(x, grid=(2, 2)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sliding_window", {"window": 0}, "window"),
        ("sliding_window", {"num_sinks": -1}, "num_sinks"),
        ("sliding_window", {"position": "alibi"}, "position"),
        ("window", {"border": "wrap"}, "border"),
    ],
)
def test_bad_options(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, 3, **options)
