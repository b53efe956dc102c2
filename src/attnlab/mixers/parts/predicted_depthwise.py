"""A depthwise convolution whose kernels are predicted from the mean token, one for each example and channel."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.masks import zero_masked

_CONVOLUTIONS = (F.conv1d, F.conv2d)


class PredictedDepthwise(nn.Module):
    r"""$r = \mathrm{DWConv}_w(v)$ with predicted kernels (Han et al. 2024, InLine, section 4.2).

    $$w = W_2\,\mathrm{GELU}(W_1 \bar x + b_1) + b_2$$

    with $\bar x$ the mean of the real tokens. $W_1$ and $W_2$ are block diagonal with ``groups`` blocks. Zero padding; masked
    tokens are zero in the convolution.

    Args:
        dim: channels of x and of v.
        groups: blocks of the two maps.
        kernel_size: k, odd side of the kernels.
        rank: of the grid, 1 or 2; $W_2$ has $k^{rank}$ rows a channel.

    Raises:
        ValueError: for an even kernel or another rank.
    """

    def __init__(self, dim: int, groups: int, *, kernel_size: int = 3, rank: int = 2, **place: Any) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if rank not in (1, 2):
            raise ValueError(f"rank: expected 1 or 2, got {rank}")
        self.kernel_size, self.rank = kernel_size, rank
        self.hidden = nn.Conv1d(dim, dim, 1, groups=groups, **place)
        self.predict = nn.Conv1d(dim, dim * kernel_size**rank, 1, groups=groups, **place)

    def kernels(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b c *k"]:
        """One kernel for each example and channel."""
        count = x.shape[1] if mask is None else mask.sum(dim=1).clamp(min=1)[:, None, None]
        mean = zero_masked(x, mask).sum(dim=1, keepdim=True) / count
        flat = self.predict(F.gelu(self.hidden(mean.transpose(1, 2))))
        return flat.view(x.shape[0], x.shape[2], *(self.kernel_size,) * self.rank)

    def forward(
        self,
        kernels: Float[Tensor, "b c *k"],
        v: Float[Tensor, "b n c"],
        grid: Grid,
        mask: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b n c"]:
        """``v`` on ``grid``, convolved with the kernels of each example."""
        image = to_grid(zero_masked(v, mask), grid).flatten(0, 1)[None]
        weight = kernels.flatten(0, 1).unsqueeze(1).to(image.dtype)
        out = _CONVOLUTIONS[self.rank - 1](image, weight, padding=self.kernel_size // 2, groups=image.shape[1])
        return from_grid(out[0].unflatten(0, kernels.shape[:2]))
