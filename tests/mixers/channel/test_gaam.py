"""Gaussian adaptive attention by its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import attnlab
from attnlab import create_mixer, record
from attnlab.core.errors import UnsupportedError
from attnlab.mixers.channel.gaam import importance_factor
from mixers.definition import assert_defined_by, build, tokens


def weigh(entries: Tensor, offsets: Tensor, widths: Tensor, eps: float) -> Tensor:
    """One chunk, an entry at a time: each Gaussian by itself, their product, its share of the sum."""
    mean = sum(entries) / len(entries)
    variance = sum((entry - mean) ** 2 for entry in entries) / max(len(entries) - 1, 1) + eps
    products = []
    for entry in entries:
        product = torch.ones((), dtype=entries.dtype)
        for delta, c in zip(offsets, widths, strict=True):
            exponent = -((entry - mean - delta) ** 2 / variance) / (2 * c**2)
            product = product * torch.exp(exponent) / torch.sqrt(2 * math.pi * c**2)
        products.append(product)
    total = torch.stack(products).sum().clamp(min=eps)
    return torch.stack([entry * product / total for entry, product in zip(entries, products, strict=True)])


def along(line: Tensor, mixer) -> Tensor:
    """All chunks of one line of entries."""
    chunks, size = mixer.num_chunks, len(line) // mixer.num_chunks
    edges = [i * size for i in range(chunks)] + [len(line)]
    parts = [
        weigh(line[a:b], mixer.offset[i], mixer.width[i], mixer.eps)
        for i, (a, b) in enumerate(itertools.pairwise(edges))
        if b > a
    ]
    return torch.cat(parts)


@pytest.mark.tier("T2", "mixer:gaam")
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"axis": "channels", "num_chunks": 5, "num_gaussians": 1, "eps": 1e-2},
        {},
        {"num_chunks": 4, "num_gaussians": 2},
        {"num_chunks": 11},
    ],
    ids=["channels", "channels-ragged", "tokens", "tokens-ragged", "more-chunks-than-tokens"],
)
def test_gaam(options) -> None:
    mixer = build("gaam", **options)

    def definition(x: Tensor) -> Tensor:
        if mixer.axis == "channels":
            return torch.stack([torch.stack([along(token, mixer) for token in example]) for example in x])
        return torch.stack([torch.stack([along(line, mixer) for line in example.T], dim=1) for example in x])

    assert_defined_by(mixer, definition, tokens())


def test_chunks_of_tokens_are_those_of_the_real_ones() -> None:
    mixer, x = build("gaam", num_chunks=3), tokens(11)
    real = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    y = mixer(x, mask=real.expand(2, -1))
    torch.testing.assert_close(y[:, real], mixer(x[:, real]), rtol=1e-12, atol=1e-14)
    assert not y[:, ~real].any()


@pytest.mark.parametrize("num_gaussians", [1, 3])
def test_weights_sum_to_one_or_are_too_small_to_stretch(num_gaussians) -> None:
    mixer, x = create_mixer("gaam", 12, 3, causal=True, num_gaussians=num_gaussians), tokens().float()
    with torch.no_grad(), record(mixer) as tape:
        mixer.width.fill_(0.7)
        mixer(x)
        shares = tape["feature_weights"].unflatten(-1, (3, 4)).sum(-1)
        torch.testing.assert_close(shares, torch.ones_like(shares))
        mixer.width.fill_(0.01)
        mixer(x)
    assert (tape["feature_weights"].unflatten(-1, (3, 4)).sum(-1) < 0.5).any()
    assert sum(parameter.numel() for parameter in mixer.parameters()) == 2 * 3 * num_gaussians


def test_statistics_stay_exact_under_autocast() -> None:
    mixer, x = create_mixer("gaam", 12, 3), 30.0 + torch.randn(2, 9, 12)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixer(x), expected)


def test_importance_is_the_mean_weight_between_the_least_and_the_greatest() -> None:
    weights, mask = torch.rand(3, 5, 4), torch.rand(3, 5) > 0.3
    mean = torch.stack([weights[mask][:, i].mean() for i in range(4)])
    expected = (mean - mean.min()) / (mean.max() - mean.min())
    torch.testing.assert_close(importance_factor(weights, mask), expected)
    torch.testing.assert_close(
        importance_factor(weights), importance_factor(weights, torch.ones(3, 5, dtype=torch.bool)), rtol=1e-5, atol=1e-6
    )
    assert not importance_factor(torch.ones(1, 2, 3)).any()


def test_tokens_are_refused_where_causal() -> None:
    with pytest.raises(UnsupportedError, match="run over all tokens"):
        create_mixer("gaam", 12, 3, causal=True, axis="tokens")


def test_channels_keep_the_laws_of_tokens_alone() -> None:
    report = attnlab.check("gaam", only="padding_*", options={"axis": "channels"})
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": "heads"}, "axis: expected"),
        ({"num_gaussians": 0}, "num_gaussians: expected a positive number"),
        ({"num_chunks": 0}, "num_chunks: expected a positive number"),
        ({"eps": 0.0}, "eps: expected a positive number"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("gaam", 12, 3, **options)
