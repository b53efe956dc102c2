"""Attention by the keys' own scores, by its definition, and its running mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS = 8, 2


def _definition(mixer, x: Tensor, allowed: Tensor) -> Tensor:
    """``allowed`` (b, n, n) says which query may use which key."""
    d, out = DIM // HEADS, []
    for b, example in enumerate(x):
        q, k, v = (layer(example).view(-1, HEADS, d) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        scores = ((q / (1 + torch.exp(-q))) * k).sum(-1) / math.sqrt(d)
        rows = []
        for i in range(len(example)):
            seen = [j for j in range(i + 1 if mixer.causal else len(example)) if allowed[b, i, j]]
            heads = []
            for h in range(HEADS):
                total = sum(torch.exp(scores[j, h]) for j in seen) if seen else 1
                heads.append(sum((torch.exp(scores[j, h]) * v[j, h] for j in seen), torch.zeros(d, dtype=x.dtype)) / total)
            rows.append(mixer.out_proj(torch.cat(heads)) * bool(seen))
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.tier("T2", "mixer:key_score")
@pytest.mark.parametrize("causal", [False, True])
def test_key_score(causal) -> None:
    mixer = build("key_score", DIM, HEADS, causal=causal)
    everything = torch.ones(2, 6, 6, dtype=torch.bool)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, everything), tokens(6, DIM))


@pytest.mark.parametrize("causal", [False, True])
def test_masks(causal) -> None:
    mixer = build("key_score", DIM, HEADS, causal=causal)
    real = torch.tensor([[False, False, True, False, True], [True, False, False, True, False]])
    pairs = torch.rand(2, 1, 5, 5) > 0.4
    both = real[:, None] & real[..., None]
    assert_defined_by(mixer, lambda x: _definition(mixer, x * real[..., None], both), tokens(5, DIM), mask=real)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, pairs[:, 0]), tokens(5, DIM), pair_mask=pairs)


def test_more_tokens_than_a_chunk() -> None:
    mixer, real = build("key_score", DIM, HEADS, causal=True), torch.rand(2, 300) > 0.3
    real[0, :140], real[1, 128:] = False, False

    def definition(x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(2, 300, HEADS, -1) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        powers = torch.exp((torch.nn.functional.silu(q) * k).sum(-1) / 2) * real[..., None]
        means = (powers[..., None] * v).cumsum(1) / powers.cumsum(1).clamp(min=1e-300)[..., None]
        return mixer.out_proj(means.flatten(2)) * real[..., None]

    assert_defined_by(mixer, definition, tokens(300, DIM), mask=real)


def test_scores_that_no_exponential_holds() -> None:
    mixer, x = create_mixer("key_score", 4, 1, causal=True), torch.randn(1, 200, 4)
    with torch.no_grad():
        mixer.q_proj.weight.mul_(60)
        mixer.k_proj.weight.mul_(60)
    y = mixer(x)
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(mixer.q_proj.weight.grad).all()
    double = mixer.double()(x.double())
    assert float((y - double).detach().abs().max()) < 1e-2


def test_the_state_does_not_grow() -> None:
    mixer = create_mixer("key_score", 8, 2, causal=True)
    state = mixer.init_state(1)
    size = state.nbytes
    for _ in range(3):
        _, state = mixer.extend(torch.randn(1, 50, 8), state)
    assert state.nbytes == size == (2 * 4 + 2) * 4


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="num_kv_heads: expected 2"):
        create_mixer("key_score", 8, 2, num_kv_heads=1)
    with pytest.raises(ValueError, match="position: expected 'none'"):
        create_mixer("key_score", 8, 2, position="rotary")
