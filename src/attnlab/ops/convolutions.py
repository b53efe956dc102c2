"""Convolution layers by the rank of the grid, whose gradients are right in bfloat16 too."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d` with a symmetric zero padding, which is made before the convolution and not by it.

    On a CPU torch 2.13 gets the bfloat16 gradient of the weights wrong, and says nothing, where the convolution pads and a side
    is short: it reads what no memory was set to. Signals and images are right.
    """

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b e t2 h2 w2"]:
        """The convolved volume."""
        sides = [int(side) for side in self.padding for _ in range(2)][::-1]
        return F.conv3d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


CONVOLUTIONS: tuple[type[nn.Conv1d], type[nn.Conv2d], type[nn.Conv3d]] = (nn.Conv1d, nn.Conv2d, Conv3d)
"""The layers of ranks 1, 2 and 3."""
