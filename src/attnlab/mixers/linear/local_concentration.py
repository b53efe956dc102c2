"""L2ViT's local concentration module: two large depthwise convolutions with a BatchNorm between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.parts.conv_bn import batch_norm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


@mixers.register(
    "local_concentration",
    family="linear",
    paper="l2vit",
    partial=True,
    supports=Supports(grid=frozenset({1, 2}), batch_coupled=True, cost=1.0),
    example={"kernel_size": 3},
)
class LocalConcentration(Mixer):
    r"""$y = \mathrm{DWConv}_k(\mathrm{BN}(\mathrm{GELU}(\mathrm{DWConv}_k(x))))$ (Zheng 2025, L2ViT: the LCM).

    In the paper's block it follows `enhanced_linear`, whose weights are dispersed, as a residual branch with a norm of its own.
    Time O(n C k^2). In training the norm takes the statistics of all real tokens of the batch, in evaluation running means;
    masked tokens are zero before each convolution, and in no statistic.

    Args:
        dim: width of the tokens.
        num_heads: of the common signature; there are no heads.
        causal: always False.
        kernel_size: k, odd.
        rank: of the grid, 1 or 2; a sequence is a grid of height 1 for rank 2.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=True``; for a grid of a rank above ``rank``.
        ValueError: for an even kernel, or another rank.
    """

    promised: Supports | None = None

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        kernel_size: int = 7,
        rank: int = 2,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if rank not in (1, 2):
            raise ValueError(f"rank: expected 1 or 2, got {rank}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rank = rank
        conv = _CONVOLUTIONS[rank - 1]
        self.first = conv(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **place)
        self.norm = nn.BatchNorm1d(dim, **place)
        self.second = conv(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **place)

        self.promised = replace(self.info.supports, grid=frozenset(range(1, rank + 1)))

    @property
    def supports(self) -> Supports:
        """Grids up to the rank of the kernels."""
        return self.info.supports if self.promised is None else self.promised

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Convolve, activate, normalise, convolve."""
        grid = (1,) * (self.rank - len(grid)) + tuple(grid)
        y = F.gelu(from_grid(self.first(to_grid(x, grid))))
        y = batch_norm(y, self.norm, masks.query)
        return from_grid(self.second(to_grid(y, grid)))
