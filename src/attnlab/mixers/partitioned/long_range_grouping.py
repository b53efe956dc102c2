"""Long-range grouping: tokens at the same offsets in all views of a scene attend to each other."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import zero_masked
from attnlab.core.tilings import lattices
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.parts.tiled_attention import TiledAttention


@mixers.register(
    "long_range_grouping",
    family="partitioned",
    paper="lrgt",
    supports=Supports(grid=frozenset({2, 3}), mixing_matrix=True, cost=2.0),
    example={"interval": 2},
)
class LongRangeGrouping(TiledAttention):
    r"""Softmax attention among the tokens that lie a whole number of intervals apart, over all views (Yang et al. 2023, LRGA).

    A token stands at (view, y, x) of a grid of V views. With interval s its group is $(y \bmod s, x \bmod s)$, whichever the
    view, and, with the values as V maps of all channels,

    $$o_i = \sum_{j \in \mathrm{group}(i)} \mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j)\, v_j, \qquad
      Y = W_o\,(O + \mathrm{DWConv}_{3 \times 3}(V))$$

    The convolution, zero at the borders of each view, is the inter-view feature signature: it tells views apart, whose tokens the
    attention takes as a set. The $s^2$ groups are those of dilated (grid) attention on each view, joined. Time O(n^2 d / s^2),
    memory O(n d). On a grid of rank 2 there is one view.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        interval: s; groups along each side of a view. The authors have 7 on views of 14 x 14.
        signature: the convolution of the values.
        **options: those of `AttentionMixer`; ``position`` must be "none".

    Raises:
        ValueError: for an interval below 1, or a position.
        UnsupportedError: with ``causal=True``, or for a grid of another rank.

    Differs from the paper: views need not be 14 x 14, nor a multiple of the interval. The layers that look inside one view are
    dense attention with the views as a batch. The merging of tokens by clusters, before the decoder, is not here.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        interval: int = 7,
        signature: bool = True,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if interval < 1:
            raise ValueError(f"interval: expected at least 1, got {interval}")
        if self.position_name != "none":
            raise ValueError(f"position: expected 'none', got {self.position_name!r}; groups have no order")
        self.interval = interval
        width = self.num_heads * self.head_dim
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.signature = nn.Conv2d(width, width, 3, padding=1, groups=width, **place) if signature else None

    def tiles(self, grid: Grid) -> tuple[Int[Tensor, "t x"], Int[Tensor, "t y"]]:
        """Groups: lattices of a view, the same in all of them."""
        cells = lattices(_views(grid), (1, self.interval, self.interval))
        return cells, cells

    def _with_local(
        self, heads: Float[Tensor, "b h n e"], v: Float[Tensor, "b hk m e"], grid: Grid | None, mask: Tensor | None
    ) -> Float[Tensor, "b h n e"]:
        if self.signature is None or grid is None:
            return heads
        b, h, n, e = heads.shape
        views, height, width = _views(grid)
        tokens = zero_masked(v.repeat_interleave(h // v.shape[1], dim=1).transpose(1, 2).flatten(2), mask)
        maps = tokens.view(b * views, height * width, h * e).mT.unflatten(2, (height, width))
        return heads + self.signature(maps).flatten(2).mT.reshape(b, n, h, e).transpose(1, 2)


def _views(grid: Grid) -> tuple[int, int, int]:
    """The number of views and their sides."""
    return (1, grid[0], grid[1]) if len(grid) == 2 else (grid[0], grid[1], grid[2])
