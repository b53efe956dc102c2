"""Hard attention over the largest scores by its definition, and switched at inference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS = 8, 2


def _definition(mixer, x: Tensor, kept: int, real: Tensor | None = None) -> Tensor:
    width, out = DIM // HEADS, []
    for b, example in enumerate(x):
        q, k, v = (layer(example) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        heads = []
        for h in range(HEADS):
            s = slice(h * width, (h + 1) * width)
            rows = []
            for i in range(len(example)):
                seen = [j for j in range(i + 1 if mixer.causal else len(example)) if real is None or real[b, j]]
                scores = {j: (q[i, s] * k[j, s]).sum() / math.sqrt(width) for j in seen}
                best = sorted(seen, key=lambda j: -float(scores[j].detach()))[:kept]
                total = sum(scores[j].exp() for j in best)
                rows.append(sum((scores[j].exp() / total * v[j, s] for j in best), torch.zeros(width, dtype=x.dtype)))
            heads.append(torch.stack(rows))
        out.append(mixer.out_proj(torch.cat(heads, -1)))
    y = torch.stack(out)
    return y if real is None else y * real[..., None]


@pytest.mark.tier("T2", "mixer:selective_hard")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kept", [1, 3, 20])
def test_selective_hard(causal, kept) -> None:
    mixer = build("selective_hard", DIM, HEADS, causal=causal, k=kept)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, kept), tokens(6, DIM))


@pytest.mark.parametrize("causal", [False, True])
def test_only_real_keys_are_chosen(causal) -> None:
    real = torch.tensor([[False, True, True, False, True, True], [True, False, False, False, False, True]])
    mixer = build("selective_hard", DIM, HEADS, causal=causal, k=2)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, 2, real), tokens(6, DIM), mask=real)


def test_a_trained_layer_is_switched() -> None:
    plain, hard = create_mixer("softmax", 8, 2), create_mixer("selective_hard", 8, 2, k=2)
    hard.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 8)
    assert ((hard.mixing_matrix(x) > 0).sum(-1) == 2).all()
    hard.k = None
    torch.testing.assert_close(hard(x), plain(x), rtol=0, atol=0)
    hard.k = 6
    torch.testing.assert_close(hard(x), plain(x))
    with pytest.raises(ValueError, match="k: expected a positive integer or None, got 0"):
        hard.k = 0
    with pytest.raises(ValueError, match="k: expected a positive integer or None, got -1"):
        create_mixer("selective_hard", 8, 2, k=-1)
