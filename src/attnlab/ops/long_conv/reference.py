"""Long convolution as its formula reads: the oracle."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def long_conv(x: Float[Tensor, "b c *grid"], kernel: Float[Tensor, "c *grid"], last: int) -> Float[Tensor, "b c ..."]:
    """The sum over all places of the filter of shifted inputs."""
    sides = x.shape[2:]
    total = x.new_zeros(x.shape)
    for place in itertools.product(*(range(side) for side in sides)):
        weights, behind = kernel, x
        for axis, shift in enumerate(place):
            weights = weights.select(1, shift)
            behind = behind.narrow(2 + axis, 0, sides[axis] - shift)
        weights = weights.view(-1, *[1] * len(sides))
        widths = [width for shift in reversed(place) for width in (shift, 0)]
        total = total + F.pad(weights * behind, widths)
    return total[..., sides[-1] - last :]
