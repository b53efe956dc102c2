"""Convolutional position: a depthwise convolution over the grid, added to the tokens."""

from __future__ import annotations

import torch
from torch import nn

from attnlab.core.grid import from_grid, resolve_grid, to_grid
from attnlab.core.masks import zero_masked
from attnlab.core.tokens import Tokens
from attnlab.ops.convolutions import CONVOLUTIONS


class ConvolutionalPosition(nn.Module):
    r"""Conditional position encoding: $x + \mathrm{DWConv}_{k}(x)$ on the grid, zero padding, with bias (Chu et al. 2021).

    It reads neighbours on all sides, so it has no place in a causal model.

    Args:
        dim: channels.
        kernel_size: odd side of the window.
        rank: rank of the grid.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 3,
        rank: int = 2,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        conv = CONVOLUTIONS[rank - 1]
        self.conv = conv(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def forward(self, tokens: Tokens) -> Tokens:
        """The tokens with their neighbourhood added; masked tokens stay zero."""
        grid = resolve_grid(tokens.grid, tokens.x.shape[1])
        x = tokens.x + from_grid(self.conv(to_grid(tokens.x, grid)))
        return tokens.with_x(zero_masked(x, tokens.mask))
