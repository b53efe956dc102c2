"""Focal modulation: gated contexts of growing size modulate each query."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked

_CONVOLUTIONS = (F.conv1d, F.conv2d)


@mixers.register(
    "focal_modulation",
    family="convolutional",
    paper="focalnet",
    supports=Supports(grid=frozenset({1, 2}), cost=1.0),
    example={"rank": 2},
)
class FocalModulation(Mixer):
    r"""Focal modulation (Yang et al. 2022, equations 4 to 7).

    With one linear map $[q, c_0, g] = W x$, levels l = 1..L of kernel $k_l = k_1 + f(l-1)$, and raw gates,

    $$c_l = \mathrm{GELU}(\mathrm{DWConv}_{k_l}(c_{l-1})), \quad c_{L+1} = \mathrm{GELU}(\mathrm{mean}\, c_L), \quad
      y = W_o\left(q \odot h\!\left(\textstyle\sum_l g_l c_l\right)\right)$$

    Time O(n C (C + sum of kernel sizes)). ``record`` collects "gates" (b, n, L + 1) and "modulator" (b, n, C); there is no matrix
    between tokens.

    Args:
        dim: width of the tokens.
        num_heads: of the common signature; the mechanism has no heads.
        causal: always False.
        levels: L.
        window: side of the first kernel, odd.
        factor: f, growth of the side from level to level, even.
        rank: of the grid on which the kernels lie, 1 or 2. A sequence is a grid of height 1 for rank 2.
        normalize: divide the sum of contexts by L + 1.
        post_norm: LayerNorm of the modulated query.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=True``; for a grid of another rank.
        ValueError: for an even kernel, a rank other than 1 and 2, or no level.

    Differs from the paper: masked tokens are zero in every context, and out of the global mean.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        levels: int = 2,
        window: int = 3,
        factor: int = 2,
        rank: int = 2,
        normalize: bool = False,
        post_norm: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if levels < 1 or window < 1 or window % 2 == 0 or factor % 2:
            raise ValueError(
                f"levels, window, factor: expected levels >= 1, an odd window, an even factor, got {levels}, {window}, {factor}"
            )
        if rank not in (1, 2):
            raise ValueError(f"rank: expected 1 or 2, got {rank}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.levels, self.rank, self.normalize = levels, rank, normalize
        self.in_proj = nn.Linear(dim, 2 * dim + levels + 1, **place)
        sides = [window + factor * level for level in range(levels)]
        kernels = [torch.empty(dim, 1, *(side,) * rank, **place) for side in sides]
        for kernel in kernels:
            nn.init.kaiming_uniform_(kernel, a=5**0.5)
        self.kernels = nn.ParameterList(kernels)
        self.modulate = nn.Linear(dim, dim, **place)
        self.post_norm = nn.LayerNorm(dim, **place) if post_norm else nn.Identity()
        self.out_proj = nn.Linear(dim, dim, **place)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Contexts level by level, their gated sum, the modulated query."""
        q, level, gates = self.in_proj(x).split([self.dim, self.dim, self.levels + 1], dim=-1)
        grid = self._as_rank(grid)
        level, total = zero_masked(level, masks.query), torch.zeros_like(level)
        for index, kernel in enumerate(self.kernels):
            level = zero_masked(F.gelu(self._convolve(level, kernel, grid)), masks.query)
            total = total + gates[..., index : index + 1] * level
        total = total + gates[..., self.levels :] * F.gelu(self._mean(level, masks.query))
        if self.normalize:
            total = total / (self.levels + 1)
        modulator = self.modulate(total)
        self.emit("gates", gates)
        self.emit("modulator", modulator)
        return self.out_proj(self.post_norm(q * modulator))

    def _as_rank(self, grid: Grid) -> Grid:
        if len(grid) == self.rank:
            return grid
        if len(grid) == 1:
            return (1, *grid)
        raise self._refusal(f"a grid of rank {len(grid)} with rank={self.rank}", "its kernels lie along one axis")

    @staticmethod
    def _convolve(x: Float[Tensor, "b n c"], kernel: Tensor, grid: Grid) -> Float[Tensor, "b n c"]:
        convolve = _CONVOLUTIONS[len(grid) - 1]
        return from_grid(convolve(to_grid(x, grid), kernel.to(x.dtype), padding=kernel.shape[-1] // 2, groups=x.shape[2]))

    @staticmethod
    def _mean(x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b 1 c"]:
        if mask is None:
            return x.mean(dim=1, keepdim=True)
        return x.sum(dim=1, keepdim=True) / mask.sum(dim=1).clamp(min=1)[:, None, None]
