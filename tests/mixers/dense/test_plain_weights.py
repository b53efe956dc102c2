"""Softmax with one added to the denominator and ReLU attention, by their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens


def _by_hand(mixer, x: Tensor, weigh) -> Tensor:
    """``weigh(logits)`` turns the logits of one query over its keys into weights."""
    heads = []
    for q, k, v in zip(*(split_heads(layer(x), 2) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj)), strict=True):
        rows = []
        for i in range(x.shape[1]):
            stop = i + 1 if mixer.causal else x.shape[1]
            logits = torch.stack([(q[:, i] * k[:, j]).sum(-1) for j in range(stop)], -1) / math.sqrt(q.shape[-1])
            weights = weigh(logits)
            rows.append(sum(weights[:, j, None] * v[:, j] for j in range(stop)))
        heads.append(torch.stack(rows, 1))
    return mixer.out_proj(torch.cat(heads, -1))


@pytest.mark.tier("T2", "mixer:softmax")
@pytest.mark.parametrize("causal", [False, True])
def test_softmax_plus_one(causal) -> None:
    mixer = build("softmax", 8, 2, causal=causal, normalizer="softmax_plus_one")
    weigh = lambda logits: logits.exp() / (1 + logits.exp().sum(-1, keepdim=True))  # noqa: E731
    assert_defined_by(mixer, lambda x: _by_hand(mixer, x, weigh), tokens(6, 8))


@pytest.mark.tier("T2", "mixer:relu")
@pytest.mark.parametrize(("causal", "power"), [(False, 1.0), (True, 1.0), (True, 0.5), (False, 0)])
def test_relu(causal, power) -> None:
    mixer = build("relu", 8, 2, causal=causal, count_power=power)
    weigh = lambda logits: logits.clamp(min=0) / logits.shape[-1] ** power  # noqa: E731
    assert_defined_by(mixer, lambda x: _by_hand(mixer, x, weigh), tokens(6, 8))


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="normalizer: expected 'softmax' or 'softmax_plus_one', got 'sigmoid'"):
        create_mixer("softmax", 8, 2, normalizer="sigmoid")
    with pytest.raises(ValueError, match="count_power: expected at least 0, got -1"):
        create_mixer("relu", 8, 2, count_power=-1)
