"""Softmax and sigmoid attention by their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens


def _heads_by_hand(mixer, x: Tensor, weigh) -> list[Tensor]:
    """Each head's output; ``weigh(logits)`` turns the logits of one query over its keys into weights."""
    n, kv = x.shape[1], mixer.num_kv_heads
    qs = split_heads(mixer.q_proj(x), mixer.num_heads)
    ks, vs = split_heads(mixer.k_proj(x), kv), split_heads(mixer.v_proj(x), kv)
    outputs = []
    for h, q in enumerate(qs):
        k, v = ks[h * kv // mixer.num_heads], vs[h * kv // mixer.num_heads]
        rows = []
        for i in range(n):
            stop = i + 1 if mixer.causal else n
            logits = torch.stack([(q[:, i] * k[:, j]).sum(-1) for j in range(stop)], dim=-1) / math.sqrt(q.shape[-1])
            weights = weigh(logits)
            rows.append(sum(weights[:, j, None] * v[:, j] for j in range(stop)))
        outputs.append(torch.stack(rows, dim=1))
    return outputs


@pytest.mark.tier("T2", "mixer:softmax")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_softmax(causal, kv) -> None:
    mixer = build("softmax", 8, 4, causal=causal, num_kv_heads=kv, qkv_bias=True)
    weigh = lambda logits: logits.exp() / logits.exp().sum(-1, keepdim=True)  # noqa: E731
    assert_defined_by(mixer, lambda x: mixer.out_proj(torch.cat(_heads_by_hand(mixer, x, weigh), -1)), tokens(6, 8))


@pytest.mark.tier("T2", "mixer:sigmoid")
@pytest.mark.parametrize(("causal", "bias"), [(False, "log_count"), (True, "log_count"), (True, -3.0)])
def test_sigmoid(causal, bias) -> None:
    mixer = build("sigmoid", 8, 2, causal=causal, logit_bias=bias, log_temperature=0.3)

    def weigh(logits: Tensor) -> Tensor:
        shift = -math.log(logits.shape[-1]) if bias == "log_count" else bias
        return 1.0 / (1.0 + torch.exp(-(logits * math.exp(0.3) + shift)))

    assert_defined_by(mixer, lambda x: mixer.out_proj(torch.cat(_heads_by_hand(mixer, x, weigh), -1)), tokens(6, 8))


def test_sigmoid_norm_at_initialisation_does_not_grow_with_length() -> None:
    torch.manual_seed(0)
    free, tied = (create_mixer("sigmoid", 64, 4, logit_bias=bias) for bias in (0.0, "log_count"))
    short, long = torch.randn(1, 16, 64), torch.randn(1, 512, 64)

    def size(mixer, x) -> float:
        return float(mixer.mixing_matrix(x).detach().sum(-1).mean())

    assert size(free, long) > 25 * size(free, short)
    assert size(tied, long) == pytest.approx(size(tied, short), rel=0.3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("softmax", {"num_kv_heads": 4}, "num_kv_heads"),
        ("softmax", {"qk_norm": "batch"}, "qk_norm"),
        ("sigmoid", {"logit_bias": "learned"}, "logit_bias"),
    ],
)
def test_dense_refuses(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, 6, **options)
