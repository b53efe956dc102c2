"""Convolution and BatchNorm over real tokens against torch's layers on the real rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab import create_mixer
from attnlab.core.grid import from_grid, to_grid
from attnlab.mixers.parts.conv_bn import ConvBN, fuse

GRIDS = [(7,), (3, 4), (2, 3, 2)]


def _part(rank: int, kernel_size: int = 3) -> ConvBN:
    part = ConvBN(4, 6, kernel_size, rank=rank, groups=2).double()
    with torch.no_grad():
        part.norm.weight.uniform_(0.5, 1.5)
        part.norm.bias.normal_()
        part.norm.running_mean.normal_()
        part.norm.running_var.uniform_(0.5, 2.0)
    return part


def _mask(n: int) -> Tensor:
    mask = torch.ones(3, n, dtype=torch.bool)
    mask[0, -2:] = mask[1, 0] = mask[2, n // 2] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=len)
def test_statistics_are_those_of_real_tokens(grid, masked) -> None:
    part, n = _part(len(grid)).train(), math.prod(grid)
    mask = _mask(n) if masked else None
    real = torch.ones(3, n, dtype=torch.bool) if mask is None else mask
    x = torch.randn(3, n, 4, dtype=torch.float64, requires_grad=True)
    mean, variance = part.norm.running_mean.clone(), part.norm.running_var.clone()
    rows = from_grid(part.conv(to_grid(x * real.unsqueeze(-1), grid)))[real]
    expected = F.batch_norm(rows, mean, variance, part.norm.weight, part.norm.bias, training=True)
    got = part(x, grid, mask)
    weight = torch.randn_like(expected)
    leaves = [x, *part.parameters()]
    ours = torch.autograd.grad((got[real] * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    torch.testing.assert_close(got[real], expected, rtol=1e-9, atol=1e-9)
    assert (got[~real] == 0).all()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(part.norm.running_mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(part.norm.running_var, variance, rtol=1e-9, atol=1e-9)
    assert int(part.norm.num_batches_tracked) == 1


def test_a_batch_without_a_real_token_teaches_nothing() -> None:
    part = _part(1).train()
    mean, variance = part.norm.running_mean.clone(), part.norm.running_var.clone()
    out = part(torch.full((2, 5, 4), float("nan"), dtype=torch.float64), (5,), torch.zeros(2, 5, dtype=torch.bool))
    assert (out == 0).all()
    assert torch.equal(part.norm.running_mean, mean)
    assert torch.equal(part.norm.running_var, variance)


def test_one_value_is_its_own_mean() -> None:
    part = _part(1).train()
    torch.testing.assert_close(part(torch.randn(1, 1, 4, dtype=torch.float64), (1,))[0, 0], part.norm.bias)


@pytest.mark.parametrize("grid", GRIDS, ids=len)
def test_fused_is_the_same_in_evaluation(grid) -> None:
    part = _part(len(grid)).eval()
    x, mask = torch.randn(3, math.prod(grid), 4, dtype=torch.float64), _mask(math.prod(grid))
    plain, masked = part(x, grid), part(x, grid, mask)
    part.fuse()
    part.fuse()
    assert part.norm is None
    torch.testing.assert_close(part(x, grid), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part(x, grid, mask), masked, rtol=1e-12, atol=1e-12)


def test_a_lower_rank_is_a_grid_of_height_one() -> None:
    part, x = _part(2).eval(), torch.randn(2, 5, 4, dtype=torch.float64)
    assert torch.equal(part(x, (5,)), part(x, (1, 5)))


@pytest.mark.parametrize("name", ["cascaded_group", "single_head"])
def test_a_fused_mixer_is_the_same(name) -> None:
    mixer = create_mixer(name, 16, 2, out_scale=1.0).double()
    for module in mixer.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    x, mask = torch.randn(2, 12, 16, dtype=torch.float64), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 4:] = False
    before = mixer.eval()(x, mask=mask, grid=(3, 4))
    fuse(mixer)
    assert not [module for module in mixer.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    torch.testing.assert_close(mixer(x, mask=mask, grid=(3, 4)), before, rtol=1e-10, atol=1e-10)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="kernel_size"):
        ConvBN(2, 2, 4)
    with pytest.raises(ValueError, match="rank"):
        ConvBN(2, 2, rank=4)
    with pytest.raises(ValueError, match="at most 1 sides"):
        ConvBN(2, 2, rank=1)(torch.randn(1, 6, 2), (2, 3))
    with pytest.raises(ValueError, match="evaluation mode"):
        ConvBN(2, 2).fuse()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grid", [(9, 10), (2, 5, 9)])
def test_gradients_of_a_batch_of_one_in_any_memory(grid, training) -> None:
    layer = ConvBN(4, 8, rank=len(grid)).double().train(training)
    x = torch.randn(1, 4, 90, dtype=torch.float64).mT.requires_grad_()
    gradient = torch.randn(1, 90, 8, dtype=torch.float64)
    y = x @ layer.conv.weight.flatten(1).T
    mean, variance = (y.mean(1), y.var(1, correction=0)) if training else (layer.norm.running_mean, layer.norm.running_var)
    expected = (y - mean) / torch.sqrt(variance + layer.norm.eps) * layer.norm.weight + layer.norm.bias
    leaves = [x, *layer.parameters()]
    wanted = torch.autograd.grad(expected, leaves, gradient)
    for ours, theirs in zip(torch.autograd.grad(layer(x, grid), leaves, gradient), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
