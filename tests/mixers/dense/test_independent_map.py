"""Attention with the map of another stream, by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import UnsupportedError, create_mixer
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS = 8, 2


def _definition(mixer, x: Tensor, source: Tensor, real: Tensor) -> Tensor:
    d, out = DIM // HEADS, []
    for b in range(len(x)):
        q, k = (layer(source[b if len(source) > 1 else 0]) for layer in (mixer.q_proj, mixer.k_proj))
        v, rows = mixer.v_proj(x[b]), []
        for i in range(x.shape[1]):
            seen = [j for j in range(i + 1 if mixer.causal else x.shape[1]) if real[b, j]]
            heads = []
            for h in range(HEADS):
                s = slice(h * d, (h + 1) * d)
                powers = {j: torch.exp((q[i, s] * k[j, s]).sum() / math.sqrt(d)) for j in seen}
                mixed = sum((p * v[j, s] for j, p in powers.items()), torch.zeros(d, dtype=x.dtype))
                heads.append(mixed / (sum(powers.values()) if seen else 1))
            rows.append(mixer.out_proj(torch.cat(heads)) * real[b, i])
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.tier("T2", "mixer:independent_map")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_independent_map(causal, batch) -> None:
    mixer, source = build("independent_map", DIM, HEADS, causal=causal), tokens(5, DIM, batch)
    everything = torch.ones(2, 5, dtype=torch.bool)

    def definition(x: Tensor) -> Tensor:
        return _definition(mixer, x, source, everything)

    with mixer.reading(source):
        assert_defined_by(mixer, definition, tokens(5, DIM))
    assert_defined_by(mixer, lambda x: _definition(mixer, x, x, everything), tokens(5, DIM))  # the block is left: x itself
    x = tokens(5, DIM).detach()
    direction = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad((y * direction).sum(), source)[0] for y in (mixer.mix_from(x, source), definition(x)))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_masked_tokens_of_the_source_take_no_part() -> None:
    mixer, source = build("independent_map", DIM, HEADS), tokens(5, DIM).detach()
    real = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    x = tokens(5, DIM).detach()
    expected = _definition(mixer, x * real[..., None], source, real)
    source[~real] = float("nan")
    torch.testing.assert_close(mixer.mix_from(x, source, mask=real), expected, rtol=1e-10, atol=1e-12)


def test_pieces_equal_the_whole() -> None:
    mixer, x, source = build("independent_map", DIM, HEADS, causal=True, position="rotary"), tokens(6, DIM), tokens(6, DIM)
    state, pieces = mixer.init_state(2), []
    for piece, part in zip(x.split([1, 3, 2], 1), source.split([1, 3, 2], 1), strict=True):
        with mixer.reading(part):
            y, state = mixer.extend(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer.mix_from(x, source))


def test_refusals() -> None:
    mixer = create_mixer("independent_map", 8, 2)
    with pytest.raises(ValueError, match=r"source: expected shape \(2, 4, 8\), or batch size 1, got \(2, 3, 8\)"):
        mixer.mix_from(torch.randn(2, 4, 8), torch.randn(2, 3, 8))
    with pytest.raises(UnsupportedError, match="context"):
        mixer(torch.randn(2, 4, 8), torch.randn(2, 4, 8))
