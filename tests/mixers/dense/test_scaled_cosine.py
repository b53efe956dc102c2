"""Scaled cosine attention by its definition, and the entropy that its scale keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens

DIM, HEADS = 6, 2
MASK = torch.tensor([[True] * 4 + [False] * 2, [True, False, True, True, True, True]])


def _definition(mixer, x: Tensor, mask: Tensor | None, bias=None) -> Tensor:
    n, d = x.shape[1], DIM // HEADS
    qs, ks, vs = (split_heads(proj(x), HEADS) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    rows = []
    for b in range(len(x)):
        for i in range(n):
            if mask is not None and not mask[b, i]:
                rows.append(torch.zeros_like(x[b, i]))
                continue
            keys = [j for j in range(i + 1 if mixer.causal else n) if mask is None or mask[b, j]]
            parts = []
            for h in range(HEADS):
                q, extra = qs[h][b, i], mixer.cosine.query_embedding
                query = q / q.norm() if extra is None else q / q.norm() + extra[h, 0]
                query = query * torch.log(1 + torch.exp(mixer.cosine.temperature[h, 0, 0]))
                query = query * math.log(len(keys)) if mixer.cosine.length_scale else query
                logits = [query @ ks[h][b, j] / ks[h][b, j].norm() for j in keys]
                logits = logits if bias is None else [z + bias[0, h, i, j] for z, j in zip(logits, keys, strict=True)]
                powers = [torch.exp(z) for z in logits]
                parts.append(sum(p * vs[h][b, j] for p, j in zip(powers, keys, strict=True)) / sum(powers))
            assert parts[0].shape == (d,)
            rows.append(mixer.out_proj(torch.cat(parts)))
    return torch.stack(rows).view(x.shape)


@pytest.mark.tier("T2", "mixer:scaled_cosine")
@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, None),
        ({"causal": True}, MASK),
        ({"length_scale": False}, MASK),
        ({"query_embedding": False, "qkv_bias": True}, MASK),
    ],
)
def test_scaled_cosine(options, mask) -> None:
    mixer = build("scaled_cosine", DIM, HEADS, **options)
    inputs = {} if mask is None else {"mask": mask}
    assert_defined_by(mixer, lambda x: _definition(mixer, x, mask), tokens(6, DIM), **inputs)


@pytest.mark.tier("T2", "mixer:scaled_cosine")
def test_with_the_position_of_the_last_stage() -> None:
    mixer, grid = build("scaled_cosine", DIM, HEADS, position="log_cpb", position_options={"hidden": 8}), (2, 3)

    def definition(x: Tensor) -> Tensor:
        return _definition(mixer, x, None, mixer.position.bias(x.new_zeros(1, HEADS, 6, 3), 6, causal=False, grid=grid).dense)

    assert_defined_by(mixer, definition, tokens(6, DIM), grid=grid)


def test_the_length_scale_keeps_the_entropy() -> None:
    """The paper's claim, at its width of a head: sixteen times the keys change a row's entropy much less with the scale."""
    change = {}
    for scaled in (True, False):
        torch.manual_seed(0)
        mixer, entropies = create_mixer("scaled_cosine", 48, 2, length_scale=scaled), []
        with torch.no_grad():
            # Without the scale as hot as the scaled form is at 64 keys, so that both begin with the same entropy.
            heat = 1 / 0.24 * (1.0 if scaled else math.log(64))
            mixer.cosine.temperature.fill_(math.log(math.expm1(heat)))
            for n in (64, 1024):
                weights = mixer.mixing_matrix(torch.randn(1, n, 48))
                entropies.append(float(-(weights * weights.clamp(min=1e-30).log()).sum(-1).mean()))
        change[scaled] = abs(entropies[1] - entropies[0])
    assert change[True] < 0.25 * change[False]
