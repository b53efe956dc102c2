"""Long convolution by Fourier transform, on a torus of at least twice the grid.

Transforms run in float64: their rounding errors are relative to the largest terms of all places, so that in float32 a place whose
own terms are small, such as the first, would lose what a sum of those terms has.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.chunks import full_precision


@full_precision
def long_conv(x: Float[Tensor, "b c *grid"], kernel: Float[Tensor, "c *grid"], last: int) -> Float[Tensor, "b c ..."]:
    """See `reference.long_conv`."""
    sides = x.shape[2:]
    if last == 1 and max(sides[:-1], default=1) == 1:
        return (x * kernel.flip(-1)).sum(-1, keepdim=True)
    axes, torus = tuple(range(-len(sides), 0)), [fast_length(2 * side - 1) for side in sides]
    product = torch.fft.rfftn(x.double(), torus, axes) * torch.fft.rfftn(kernel.double(), torus, axes)
    y = torch.fft.irfftn(product, torus, axes)
    for axis, side in zip(axes[:-1], sides[:-1], strict=True):
        y = y.narrow(axis, 0, side)
    return y.narrow(-1, sides[-1] - last, last).to(x.dtype)


def fast_length(needed: int) -> int:
    """The smallest length of at least ``needed`` without a prime factor above 5, which transforms fast."""
    best = 1 << (needed - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            quotient = -(-needed // three)
            best = min(best, three << (quotient - 1).bit_length())
            three *= 3
        five *= 5
    return best
