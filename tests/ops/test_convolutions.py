"""Convolutions of volumes in bfloat16: gradients against float64, where torch's own padding gives garbage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnlab.core.tokens import Tokens
from attnlab.mixers.parts.conv_bn import ConvBN
from attnlab.ops.convolutions import Conv3d
from attnlab.positions.convolutional import ConvolutionalPosition
from attnlab.positions.lepe import LocallyEnhancedPosition
from ops.oracle import relative_error

GRID = (2, 2, 2)


def lepe() -> tuple[nn.Module, Callable]:
    part = LocallyEnhancedPosition(2, 2, rank=3)
    return part, lambda x: part.local(x.unflatten(-1, (2, 2)).transpose(1, 2), GRID, None).transpose(1, 2).flatten(2)


def convolutional() -> tuple[nn.Module, Callable]:
    part = ConvolutionalPosition(4, rank=3)
    return part, lambda x: part(Tokens(x, grid=GRID)).x - x


def conv_bn() -> tuple[nn.Module, Callable]:
    part = ConvBN(4, 4, 3, rank=3, groups=4)
    part.norm = None
    return part, lambda x: part(x, GRID)


def weight_gradient(part: nn.Module, run: Callable, x: Tensor, dtype: torch.dtype) -> Tensor:
    part.to(dtype)
    y = run(x.to(dtype))
    sides = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    return torch.autograd.grad(y, part.conv.weight, sides.to(dtype))[0]


@pytest.mark.parametrize("make", [lepe, convolutional, conv_bn])
def test_weights_of_volumes_learn_in_bfloat16(make) -> None:
    part, run = make()
    with torch.no_grad():
        part.conv.weight.copy_(part.conv.weight.bfloat16())
    x = torch.randn(2, 8, 4).bfloat16()
    ours = weight_gradient(part, run, x, torch.bfloat16)
    assert relative_error(ours, weight_gradient(part, run, x, torch.float64)) < 0.02  # products of 8 bits, 16 summed


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"padding": (2, 0, 1), "stride": 2}, {"padding": 2, "dilation": 2}])
def test_equals_the_layer_of_torch(options) -> None:
    ours, theirs = (kind(4, 6, 3, groups=2, **options).double() for kind in (Conv3d, nn.Conv3d))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 5, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
