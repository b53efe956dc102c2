"""Self-attention inside a sliding convolution window, whose zero padding takes part, and a convolution behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.mixers.parts.sliding_boxes import sliding_boxes
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention

DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))
"""Which way the groups of channels are shifted: along a row, along a column, then diagonally."""


@mixers.register(
    "msa_conv",
    family="local",
    paper="tic",
    supports=Supports(grid=frozenset({2}), mixing_matrix=True, cost=1.0),
)
class MSAConv(Mixer):
    r"""Softmax attention of a convolution's window, zero padding included (Zhang et al. 2023, TiC, MSA-Conv).

    For one head of width d, with the $k_h \times k_w$ offsets o of a window in steps of the dilation,

    $$y_p = \sum_o \mathrm{softmax}_o(d^{-1/2}\, q_p^\top k_{p + o})\, v_{p + o} \qquad
      \mathrm{out} = \mathrm{ReLU}\big(\mathrm{Conv}_{k_h \times k_w}(y + X)\big)$$

    Keys and values outside of the map are zero and take part: a logit of 0 in the softmax, and nothing in the sum, so that rows
    of the mixing matrix sum to less than one at borders (neither the masked nor the shifted border). In tiles: time
    O(n (k + 8)^2 C + n k^2 C^2), memory O(n C).

    Masked cells are as cells outside of the map, in the attention and in the convolution.

    Args:
        dim: C, width of the tokens.
        num_heads: heads; the released module has one, so that its scale is $C^{-1/2}$.
        causal: always False.
        window: k, odd; one number, or rows and columns.
        dilation: distance of the keys of a window; the convolution behind has none.
        directions: in how many directions channels are shifted, up to 8: they are cut into as many groups, each is rolled round
            the map by half a window its own way (right, left, down, up, diagonally) before the projections, and back behind the
            attention. 0 shifts none.
        conv_bias: whether the convolution has a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an even window, a dilation below 1, or directions that are not 0 to 8 or do not divide ``dim``.
        UnsupportedError: with ``causal=True``, without a grid of rank 2, or for a mixing matrix where channels are shifted.

    Differs from the paper: no dropout on the weights. The shifts are a RECONSTRUCTION: the authors' repository has none, and the
    paper's words leave open how channels are grouped. Its pooling between blocks is no part of the mixer.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        window: int | Sequence[int] = 3,
        dilation: int = 1,
        directions: int = 0,
        conv_bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        sides = (window, window) if isinstance(window, int) else tuple(window)
        if len(sides) != 2 or min(sides) < 1 or not all(side % 2 for side in sides):
            raise ValueError(f"window: expected one or two odd positive numbers, got {window}")
        if dilation < 1:
            raise ValueError(f"dilation: expected a positive number, got {dilation}")
        if not 0 <= directions <= len(DIRECTIONS) or (directions and dim % directions):
            raise ValueError(f"directions: expected 0 to {len(DIRECTIONS)}, a divisor of dim={dim}, got {directions}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.window, self.dilation, self.directions = (sides[0], sides[1]), dilation, directions
        self.in_proj = nn.Linear(dim, 3 * dim, **place)
        padding = (sides[0] // 2, sides[1] // 2)
        self.conv = nn.Conv2d(dim, dim, self.window, padding=padding, bias=conv_bias, **place)

    @property
    def supports(self) -> Supports:
        """Where channels are shifted apart no matrix multiplies whole values."""
        found = self.info.supports
        return replace(found, mixing_matrix=False) if getattr(self, "directions", 0) else found

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Attend inside windows, add the tokens, convolve."""
        q, k, v = self._project(self._shift(x, grid, 1), masks.query)
        heads = self._attend(q, k, v, grid)
        self.emit("values", v)
        self.emit("mixed", heads)
        self.emit("attention", lambda: self.matrix(self._shift(x, grid, 1), None, masks, grid))
        y = self._shift(rearrange(heads, "b h n d -> b n (h d)"), grid, -1)
        return F.relu(from_grid(self.conv(to_grid(zero_masked(y + x, masks.query), grid))))

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What attention makes of identity values."""
        q, k, _ = self._project(x, masks.query)
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        eye = eye if masks.query is None else eye * masks.query[:, None, :, None]
        return self._attend(q, k, eye.expand(*q.shape[:2], -1, -1), grid)

    def _project(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
        """Queries, keys and values, zero at masked cells as outside of the map."""
        parts = zero_masked(self.in_proj(x), mask)
        q, k, v = rearrange(parts, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return q, k, v

    def _attend(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"], grid: Grid
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over each window, zeros outside of the map included."""
        boxes = sliding_boxes(grid, self.window, (self.dilation,) * 2)
        queries, keys = boxes.queries.to(q.device), boxes.keys.to(q.device)
        bias = boxes.bias(q.new_zeros(1, self.window[0] * self.window[1]))
        found = tile_attention(q, k, v, queries[None, None], keys[None, None], bias=bias, outside="zero")
        return from_tiles(found.output, places_of(queries, q.shape[2]))

    def _shift(self, x: Float[Tensor, "b n c"], grid: Grid, sign: int) -> Float[Tensor, "b n c"]:
        """Groups of channels rolled round the map, each its own way."""
        if not self.directions:
            return x
        steps = [max(1, side // 2) for side in self.window]
        rolled = [
            part.roll((sign * way[0] * steps[0], sign * way[1] * steps[1]), dims=(2, 3))
            for part, way in zip(to_grid(x, grid).chunk(self.directions, dim=1), DIRECTIONS, strict=False)
        ]
        return from_grid(torch.cat(rolled, dim=1))
