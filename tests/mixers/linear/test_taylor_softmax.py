"""Second-order softmax attention by its definition, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnlab
from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS = 8, 2


def _turned(head: Tensor, place: int) -> Tensor:
    """Two pairs of channels, (0, 2) and (1, 3), by the angles of their positions."""
    out = []
    for pair in range(2):
        angle = torch.tensor(place * 10000.0 ** (-pair / 2), dtype=torch.float64).float().double()
        out.append((head[pair], head[pair + 2], angle))
    first = [a * torch.cos(t) - b * torch.sin(t) for a, b, t in out]
    return torch.stack(first + [b * torch.cos(t) + a * torch.sin(t) for a, b, t in out])


def _definition(mixer, x: Tensor, rotary: bool, real: Tensor | None = None) -> Tensor:
    d, out = DIM // HEADS, []
    for b, example in enumerate(x):
        q, k, v = (layer(example).view(-1, HEADS, d) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        rows = []
        for i in range(len(example)):
            seen = [j for j in range(i + 1 if mixer.causal else len(example)) if real is None or real[b, j]]
            heads = []
            for h in range(HEADS):
                turn = _turned if rotary else lambda head, _: head
                scores = {j: (turn(q[i, h], i) * turn(k[j, h], j)).sum() / math.sqrt(d) for j in seen}
                weights = {j: 1 + s + s * s / 2 for j, s in scores.items()}
                mixed = sum((w * v[j, h] for j, w in weights.items()), torch.zeros(d, dtype=x.dtype))
                heads.append(mixed / (sum(weights.values()) if seen else 1))
            rows.append(mixer.out_proj(torch.cat(heads)))
        out.append(torch.stack(rows))
    y = torch.stack(out)
    return y if real is None else y * real[..., None]


@pytest.mark.tier("T2", "mixer:taylor_softmax")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("position", ["none", "rotary"])
@pytest.mark.parametrize("by_pairs", [0, 16])
def test_taylor_softmax(causal, position, by_pairs, monkeypatch) -> None:
    monkeypatch.setattr("attnlab.mixers.linear.taylor_softmax._BY_PAIRS", by_pairs)
    mixer = build("taylor_softmax", DIM, HEADS, causal=causal, position=position)
    if position == "rotary":  # in float32 the frequencies carry a rounding that is theirs and ours
        mixer.position.frequencies = torch.tensor([1.0, 0.01], dtype=torch.float64)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, position == "rotary"), tokens(6, DIM))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("by_pairs", [0, 16])
def test_masked_tokens_take_no_part(causal, by_pairs, monkeypatch) -> None:
    monkeypatch.setattr("attnlab.mixers.linear.taylor_softmax._BY_PAIRS", by_pairs)
    mixer = build("taylor_softmax", DIM, HEADS, causal=causal)
    real = torch.tensor([[False, True, True, False, True], [True, False, False, True, False]])
    assert_defined_by(mixer, lambda x: _definition(mixer, x, False, real), tokens(5, DIM), mask=real)


def test_the_contract_by_features(monkeypatch) -> None:
    monkeypatch.setattr("attnlab.mixers.linear.taylor_softmax._BY_PAIRS", 0)
    report = attnlab.check("taylor_softmax")
    assert report.passed, str(report)


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_the_contract_with_a_position(position) -> None:
    report = attnlab.check("taylor_softmax", options={"position": position}, only=["streaming*", "caus*", "packed*"])
    assert report.passed, str(report)


def test_near_softmax_where_scores_are_small() -> None:
    soft, taylor = create_mixer("softmax", 16, 2, dtype=torch.float64), create_mixer("taylor_softmax", 16, 2, dtype=torch.float64)
    taylor.load_state_dict(soft.state_dict())
    errors = []
    for size in (1.0, 0.5):
        x = size * torch.randn(1, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        errors.append(float((taylor.mixing_matrix(x) - soft.mixing_matrix(x)).detach().abs().max()))
    assert errors[1] < errors[0] / 16  # the third order is missing, and a score is a square of x: 2 ** 6 at best


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="num_kv_heads: expected 2"):
        create_mixer("taylor_softmax", 8, 2, num_kv_heads=1)
    with pytest.raises(ValueError, match=r"position: expected one in queries and keys, .* got 'alibi'"):
        create_mixer("taylor_softmax", 8, 2, position="alibi")
