"""The convolutional gated linear unit: a token's neighbours open its gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.channel_mixers.gated import GLU
from attnlab.channel_mixers.registry import channel_mixers
from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.masks import zero_masked


@channel_mixers.register("conv_glu", paper="transnext")
class ConvGLU(GLU):
    r"""$W_o\,(\mathrm{GELU}(\mathrm{DWConv}_3(W_g x)) \odot W_u x)$ (Shi 2023, section 3.4).

    `GLU` whose gate reads the 3 x 3 cells around: a channel attention from the nearest neighbours, with zeros outside the map.
    Time O(n C hidden). Masked tokens are zero in the convolution.

    Args:
        dim: width of the tokens.
        hidden: inner width; by default 8/3 dim, rounded down, which is the authors' for an MLP ratio of 4: int(2/3 ratio dim).
        bias: whether the linear layers have one.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: in use, for a grid of rank 3; a sequence is a grid of height 1.
    """

    per_token = False

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        hidden = int(8 * dim / 3) if hidden is None else hidden
        super().__init__(dim, hidden, activation="gelu", bias=bias, device=device, dtype=dtype)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "b n c"]:
        """Each token through the gate that its neighbourhood opens."""
        grid = (1, x.shape[1]) if grid is None else (1, *grid) if len(grid) == 1 else grid
        if len(grid) != 2:
            raise ValueError(f"grid: expected rank 1 or 2, got {grid}")
        gate, value = self.up(x).chunk(2, dim=-1)
        # A bias stands at masked tokens, and so would what a caller did not zero.
        gate = from_grid(self.conv(to_grid(zero_masked(gate, mask), grid)))
        return self.down(F.gelu(gate) * value)
