"""Kernelised attention with relative position by its definition, its features, and what the weights by offset may be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from attnlab.mixers.parts.random_features import orthogonal_directions, positive_features, trigonometric_features
from mixers.definition import assert_defined_by, build, split_heads, tokens

SMALL = {"rank": 1, "size": 4, "other_sizes": "clipped"}


def _features(mixer, x: Tensor) -> Tensor:
    """The features of one token of one head."""
    if mixer.normalize:
        x = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    x = x * math.sqrt(mixer.scale)
    if mixer.feature_map == "elu":
        return torch.where(x > 0, x + 1, x.exp())
    angles = torch.stack([(x * w).sum(-1) for w in mixer.directions], dim=-1)
    size, count = x.square().sum(-1, keepdim=True), len(mixer.directions)
    if mixer.feature_map == "positive":
        return torch.exp(-size / 2) / math.sqrt(count) * angles.exp()
    return torch.exp(size / 2) / math.sqrt(count) * torch.cat((angles.sin(), angles.cos()), dim=-1)


def _definition(mixer, x: Tensor) -> Tensor:
    n, heads = x.shape[1], []
    parts = (split_heads(layer(x), mixer.num_heads) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    for h, (q, k, v) in enumerate(zip(*parts, strict=True)):
        rows = []
        for i in range(n):
            above, below = 0, 0
            for j in range(i + 1 if mixer.causal else n):
                weight = (_features(mixer, q[:, i]) * _features(mixer, k[:, j])).sum(-1, keepdim=True)
                if mixer.position_name == "offset_table":  # its table runs by query minus key
                    weight = weight * torch.exp(mixer.position.table[h, max(-3, min(3, i - j)) + 3])
                above, below = above + weight * v[:, j], below + weight
            rows.append(above / below)
        heads.append(torch.stack(rows, dim=1))
    return mixer.out_proj(torch.cat(heads, dim=-1))


@pytest.mark.tier("T2", "mixer:kernelized_relative")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": False},
        {"feature_map": "elu"},
        {"feature_map": "trigonometric", "num_features": 64},
        {"position": "none"},
    ],
    ids=str,
)
def test_definition(causal, options) -> None:
    torch.manual_seed(4)
    place = {} if "position" in options else {"position_options": SMALL}
    mixer = build("kernelized_relative", 8, 2, causal=causal, **{"num_features": 5, **place, **options})
    assert_defined_by(mixer, lambda x: _definition(mixer, x), tokens(7, 8))


def test_many_features_give_softmax_attention_with_a_bias() -> None:
    options = {"position": "buckets", "position_options": {"num_buckets": 8, "max_distance": 16}}
    mixer = build("kernelized_relative", 8, 2, num_features=1 << 15, **options)
    softmax = build("softmax", 8, 2, **options)
    softmax.load_state_dict({name: value for name, value in mixer.state_dict().items() if name != "directions"})
    x = tokens(9, 8).detach()
    q, k, _ = mixer.project(x)
    unit = [t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k)]
    term = mixer.position.bias(q, 9, causal=False, grid=None).expanded(q, 9, 1.0)
    expected = torch.softmax(unit[0] @ unit[1].mT + term, dim=-1)
    torch.testing.assert_close(mixer.mixing_matrix(x), expected, rtol=0.05, atol=0.005)


def test_normalised_queries_and_keys_are_estimated_with_less_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = 3.0 * torch.randn(2, 64, 16, generator=generator, dtype=torch.float64)

    def error(a: Tensor, b: Tensor) -> float:
        exact = (a * b).sum(-1).exp()
        tries = []
        for _ in range(50):
            w = orthogonal_directions(32, 16, generator=generator, dtype=torch.float64)
            tries.append((positive_features(a, w) * positive_features(b, w)).sum(-1) / exact - 1.0)
        return float(torch.stack(tries).square().mean().sqrt())

    unit = [t / t.norm(dim=-1, keepdim=True) for t in (x, y)]
    raw = [t * 16**-0.25 for t in (x, y)]
    assert error(*unit) < 0.5
    assert error(*raw) > 2 * error(*unit)


@pytest.mark.parametrize("features", [positive_features, trigonometric_features])
def test_products_of_features_estimate_the_exponential(features) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.nn.functional.normalize(torch.randn(2, 8, 4, generator=generator, dtype=torch.float64), dim=-1)
    w = orthogonal_directions(1 << 16, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(features(x, w) @ features(y, w).mT, (x @ y.mT).exp(), rtol=0.05, atol=0.02)


def test_directions_are_orthogonal_in_blocks_and_as_long_as_normal_ones() -> None:
    w = orthogonal_directions(40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = w[:16] @ w[:16].T
    assert float((products - products.diag().diag()).abs().max()) < 1e-4
    assert 12.0 < float(w.square().sum(-1).mean()) < 20.0
    assert w.shape == (40, 16)


def test_directions_come_from_the_generator_and_are_saved() -> None:
    one, two = (create_mixer("kernelized_relative", 8, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.directions, two.directions)
    assert "directions" in one.state_dict()
    one.redraw(torch.Generator().manual_seed(4))
    assert not torch.equal(one.directions, two.directions)
    two.redraw(torch.Generator().manual_seed(4))
    assert torch.equal(one.directions, two.directions)


def test_a_large_bias_does_not_overflow() -> None:
    mixer = create_mixer("kernelized_relative", 8, 2)
    x = torch.randn(1, 6, 8)
    before = mixer(x)
    with torch.no_grad():
        mixer.position.table.add_(200.0)
    torch.testing.assert_close(mixer(x), before)


@pytest.mark.parametrize("position", ["relative", "urpe", "absolute_offsets"])
def test_positions_that_are_no_bias_by_offset(position) -> None:
    with pytest.raises(ValueError, match="a bias by offset alone"):
        create_mixer("kernelized_relative", 8, 2, position=position)(torch.randn(1, 3, 8))


@pytest.mark.parametrize(("option", "value"), [("feature_map", "cosine"), ("num_features", 0), ("scale", 0.0)])
def test_bad_options(option, value) -> None:
    with pytest.raises(ValueError, match=option):
        create_mixer("kernelized_relative", 8, 2, **{option: value})
