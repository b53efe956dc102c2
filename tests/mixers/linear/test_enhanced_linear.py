"""L2ViT's linear attention by its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens


@pytest.mark.tier("T2", "mixer:enhanced_linear")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("minimum", [100.0, 2, 1e-9])
def test_enhanced_linear(causal, minimum) -> None:
    mixer = build("enhanced_linear", 8, 2, causal=causal, denominator_min=minimum)

    def definition(x: Tensor) -> Tensor:
        q, k, v = (split_heads(layer(x), 2) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        heads = []
        for h in range(2):
            phi_q, phi_k, rows = q[h].clamp(min=0), k[h].clamp(min=0), []
            for i in range(x.shape[1]):
                seen = slice(0, i + 1 if causal else None)
                weight = (phi_q[:, i] * phi_k[:, seen].sum(1)).sum(-1).clamp(min=float(minimum))
                summed = torch.einsum("bjd,bje->bde", phi_k[:, seen], v[h][:, seen]) * mixer.normalizer.temperature[h]
                rows.append(torch.einsum("bd,bde->be", phi_q[:, i], summed) / weight[:, None])
            heads.append(torch.stack(rows, 1))
        return mixer.out_proj(torch.cat(heads, -1))

    assert_defined_by(mixer, definition, tokens(6, 8))


def test_the_temperature_begins_as_the_usual_scale() -> None:
    mixer = create_mixer("enhanced_linear", 32, 2)
    assert mixer.normalizer.temperature.shape == (2, 1, 1)
    assert torch.equal(mixer.normalizer.temperature, torch.full((2, 1, 1), 0.25))


def test_few_tokens_are_divided_by_the_minimum() -> None:
    """The temperature cannot hide in the queries: here doubling them doubles the output, of a quotient it would not."""
    mixer = build("enhanced_linear", 8, 2, qkv_bias=False, out_bias=False)
    x = 0.1 * tokens(4, 8).detach()
    before = mixer(x)
    with torch.no_grad():
        mixer.q_proj.weight.mul_(2.0)
    torch.testing.assert_close(mixer(x), 2.0 * before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"denominator_min": -1.0}, "minimum: expected a positive number"),
        ({"position": "rotary"}, "position: expected 'none'"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("enhanced_linear", 8, 2, **options)
