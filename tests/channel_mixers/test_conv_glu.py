"""The convolutional gated linear unit by its definition; padding stays out of the convolution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import UnsupportedError, create_mixer
from attnlab.channel_mixers import create_channel_mixer
from attnlab.models.block import Block

D = torch.float64
MASK = torch.tensor([[True] * 9 + [False] * 3, [False, True, True, True, True, False, True, True, True, True, True, True]])


def _by_hand(glu, x: Tensor, grid: tuple[int, int], mask: Tensor) -> Tensor:
    """Token by token, the kernel cell by cell."""
    height, width = grid
    rows = []
    for b in range(len(x)):
        inner = [glu.up(token).split(glu.hidden) for token in x[b]]
        for i in range(height * width):
            gate = glu.conv.bias
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    row, column = i // width + dy, i % width + dx
                    if 0 <= row < height and 0 <= column < width and mask[b, row * width + column]:
                        gate = gate + glu.conv.weight[:, 0, dy + 1, dx + 1] * inner[row * width + column][0]
            opened = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
            rows.append(glu.down(opened * inner[i][1]))
    return torch.stack(rows).view_as(x)


@pytest.mark.tier("T2", "channel_mixer:conv_glu")
@pytest.mark.parametrize(
    ("grid", "mask", "options"),
    [((3, 4), None, {}), ((4, 3), MASK, {"hidden": 5}), (None, MASK, {"bias": False}), ((12,), None, {})],
)
def test_conv_glu(grid, mask, options) -> None:
    glu = create_channel_mixer("conv_glu", dim=6, dtype=D, **options)
    x = torch.randn(2, 12, 6, dtype=D, requires_grad=True)
    real = torch.ones(2, 12, dtype=torch.bool) if mask is None else mask
    sides = grid if grid is not None and len(grid) == 2 else (1, 12)
    ours, theirs = glu(x, mask=mask, grid=grid), _by_hand(glu, x, sides, real)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    weight, leaves = torch.randn_like(ours), [x, *glu.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_what_stands_at_masked_tokens_does_not_matter() -> None:
    glu = create_channel_mixer("conv_glu", dim=6, dtype=D)
    x = torch.randn(2, 12, 6, dtype=D)
    other = x.masked_fill(~MASK.unsqueeze(-1), float("nan"))
    assert torch.equal(glu(x, mask=MASK, grid=(3, 4))[MASK], glu(other, mask=MASK, grid=(3, 4))[MASK])


def test_the_default_width_is_two_thirds_of_the_mlps_rounded_down() -> None:
    assert [create_channel_mixer("conv_glu", dim=dim, device="meta").hidden for dim in (48, 16, 7)] == [128, 42, 18]


def test_it_is_refused_in_a_causal_block_and_on_volumes() -> None:
    glu = create_channel_mixer("conv_glu", dim=6)
    with pytest.raises(UnsupportedError, match="neighbours"):
        Block(6, create_mixer("softmax", 6, 2, causal=True), glu)
    with pytest.raises(ValueError, match="grid: expected rank 1 or 2"):
        glu(torch.randn(1, 8, 6), grid=(2, 2, 2))
