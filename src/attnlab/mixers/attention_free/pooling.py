"""Pooling: the mean of the neighbourhood minus the token, without any parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.ops.backends import accumulate_dtype

_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


@mixers.register(
    "pooling",
    family="attention_free",
    paper="metaformer-poolformer",
    supports=Supports(grid=frozenset({1, 2, 3}), mixing_matrix=True, cost=1.0),
)
class Pooling(Mixer):
    r"""Average pooling as token mixer (Yu et al. 2021, MetaFormer, equation 4).

    $$y_i = \frac{1}{|N(i)|} \sum_{j \in N(i)} x_j - x_i$$

    with N(i) the real tokens in a window of ``size`` cells a side around i, inside the grid. The token itself is subtracted
    because the block adds it again. Time O(n C), no parameters.

    Args:
        dim: width of the tokens.
        num_heads: of the common signature; the mechanism has no heads.
        causal: always False.
        size: side of the window, odd.
        device: of the common signature; there are no parameters.
        dtype: of the common signature; there are no parameters.

    Raises:
        UnsupportedError: with ``causal=True``.
        ValueError: for an even size.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        size: int = 3,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size: expected an odd number, got {size}")
        self.size = size

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """The mean of the window's real tokens minus the token."""
        y = self._pool(x, masks.query, grid)
        self.emit("values", x.unsqueeze(1))
        self.emit("mixed", y.unsqueeze(1))
        return y

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What pooling makes of the identity (b, 1, n, n)."""
        identity = torch.eye(x.shape[1], device=x.device, dtype=x.dtype).expand(x.shape[0], -1, -1)
        if masks.query is not None:
            identity = identity.masked_fill(~masks.query.unsqueeze(-1), 0.0)
        return self._pool(identity, masks.query, grid).unsqueeze(1)

    def _pool(self, x: Float[Tensor, "b n e"], mask: Tensor | None, grid: Grid) -> Float[Tensor, "b n e"]:
        pool = _POOLS[len(grid) - 1]
        half = self.size // 2
        wide = accumulate_dtype(x.dtype)
        real = (torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask).unsqueeze(-1).to(wide)
        # Both are means over the full window with zeros outside; their quotient is the mean over the real tokens.
        around = (half,) * (2 * len(grid))  # padded by hand: torch's 3-D pooling refuses a grid that is smaller than the window
        total = pool(F.pad(to_grid(x.to(wide), grid), around), self.size, stride=1)
        share = pool(F.pad(to_grid(real, grid), around), self.size, stride=1)
        share = share.masked_fill(share == 0, 1.0)
        return from_grid(total / share).to(x.dtype) - x
