from __future__ import annotations

import pytest
import torch

from attnlab.core.errors import UnknownNameError, UnsupportedError
from attnlab.models.norms import create_norm

NAMES = ("layer_norm", "rms_norm", "group_norm", "none")


def test_group_norm_is_one_group_over_tokens_and_channels():
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    norm = create_norm("group_norm", 6, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    mean, variance = x.mean((1, 2), keepdim=True), x.var((1, 2), correction=0, keepdim=True)
    expected = (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    everything = torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(norm(x, everything), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing_and_stays_zero(name):
    norm = create_norm(name, 6, dtype=torch.float64)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    short = torch.randn(2, 4, 6, dtype=torch.float64)
    mask = torch.tensor([False, True, True, False, True, True])
    padded = torch.full((2, 6, 6), float("nan"), dtype=torch.float64)
    padded[:, mask] = short
    y = norm(padded, mask.expand(2, -1))
    torch.testing.assert_close(y[:, mask], norm(short), rtol=1e-12, atol=1e-12)
    assert torch.equal(y[:, ~mask], torch.zeros(2, 2, 6, dtype=torch.float64))


def test_group_norm_of_an_example_without_tokens_is_zero_with_zero_gradient():
    norm = create_norm("group_norm", 3)
    x = torch.randn(2, 4, 3, requires_grad=True)
    mask = torch.tensor([[True] * 4, [False] * 4])
    norm(x, mask).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad[1].abs().sum() == 0


def test_group_norm_is_refused_where_the_future_must_not_be_seen():
    with pytest.raises(UnsupportedError, match=r"'group_norm' does not support a causal model.*layer_norm, rms_norm"):
        create_norm("group_norm", 8, causal=True)


def test_an_unknown_norm_is_named():
    with pytest.raises(UnknownNameError, match=r"norm: .*'layernorm'; did you mean 'layer_norm'"):
        create_norm("layernorm", 8)


def test_the_simple_norm_has_no_weights_and_leaves_a_root_mean_square_of_1():
    norm, x = create_norm("simple_rms_norm", 6), torch.randn(2, 3, 6, dtype=torch.float64)
    assert not list(norm.parameters())
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    mask = torch.tensor([[True, False, True]] * 2)
    assert torch.equal(norm(x, mask)[:, 1], torch.zeros(2, 6, dtype=torch.float64))
