"""Outlook attention: a token predicts the weights among all cells of the window around it."""

from __future__ import annotations

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
from attnlab.core.masks import Masks
from attnlab.ops.aggregation import fold_kernels, neighborhood_aggregation


@mixers.register(
    "outlook",
    family="local",
    paper="volo",
    supports=Supports(grid=frozenset({2}), mixing_matrix=True, cost=1.0),
)
class OutlookAttention(Mixer):
    r"""Weights among the cells of a window by one linear layer on its centre (Yuan et al. 2021, VOLO, section 3.1).

    For one head of width d, windows l of k x k cells, s cells apart, with centre tokens
    $c_l = \mathrm{mean}(x \text{ in the } s \times s \text{ cells from } l)$:

    $$A_l = \mathrm{softmax}_c\big(d^{-1/2}\,(W_a c_l + b_a)\big) \in \mathbb{R}^{k^2 \times k^2} \qquad
      y_j = \sum_{l,\, r:\; l + r = j} \; \sum_c A_{l r c}\, v_{l + c}$$

    Row r of A makes what place r of the window receives, values outside of the grid are zero, and a token sums what all windows
    give it, undivided: four of them at most with k = 3 and s = 2, fewer at borders. No product of queries and keys.
    Both steps are one aggregation with windows of 2 k - 1 cells a side (`fold_kernels`): time O(n h (k^4 / s^2 + (2 k)^2 d)
    + n C^2), memory O(n (C + h k^4 / s^2)), where unfolding copies the values $k^2 / s^2$ times.

    Masked cells are as cells outside of the grid: zero values, in no mean; a window whose s x s cells are all masked is none.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always False.
        window: k, odd.
        stride: s.
        v_bias: whether values have a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an even window, or a number below 1.
        UnsupportedError: with ``causal=True``, or without a grid of rank 2.

    Differs from the paper: no dropout; linear layers begin as PyTorch's do. Windows are padded by half their side, as published.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        window: int = 3,
        stride: int = 2,
        v_bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window: expected an odd positive number, got {window}")
        if stride < 1:
            raise ValueError(f"stride: expected a positive number, got {stride}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.window, self.stride = window, stride
        self.v_proj = nn.Linear(dim, dim, bias=v_bias, **place)
        self.weight_proj = nn.Linear(dim, num_heads * window**4, **place)
        self.out_proj = nn.Linear(dim, dim, **place)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Predict the weights, mix the values, project back."""
        v = self.v_proj(x)
        v = v if masks.query is None else v.masked_fill(~masks.query.unsqueeze(-1), 0.0)
        v = rearrange(v, "b n (h d) -> b h n d", h=self.num_heads)
        heads = self._aggregate(self._weights(x, masks.query, grid), v, grid)
        self.emit("values", v)
        self.emit("mixed", heads)
        return self.out_proj(rearrange(heads, "b h n d -> b n (h d)"))

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What the weights make of identity values."""
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        eye = eye if masks.query is None else eye * masks.query[:, None, :, None]
        return self._aggregate(self._weights(x, masks.query, grid), eye.expand(x.shape[0], self.num_heads, -1, -1), grid)

    def _aggregate(
        self, weights: Float[Tensor, "b h l k k"], v: Float[Tensor, "b h n e"], grid: Grid
    ) -> Float[Tensor, "b h n e"]:
        """What all windows give to each cell."""
        kernels = fold_kernels(weights, grid=grid, window=self.window, stride=self.stride)
        return neighborhood_aggregation(kernels, v, grid=grid, window=2 * self.window - 1)

    def _weights(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, grid: Grid) -> Float[Tensor, "b h l k k"]:
        """A of every window; 0 for windows that are none."""
        centers, real = self._centers(x, mask, grid)
        logits = rearrange(self.weight_proj(centers), "b l (h r c) -> b h l r c", h=self.num_heads, r=self.window**2)
        weights = (logits * (self.dim // self.num_heads) ** -0.5).softmax(-1)
        return weights if real is None else weights * real[:, None, :, None, None]

    def _centers(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, grid: Grid
    ) -> tuple[Float[Tensor, "b l c"], Bool[Tensor, "b l"] | None]:
        """The mean of the real cells of each s x s box, and which boxes have any."""
        mean = from_grid(F.avg_pool2d(to_grid(x, grid), self.stride, ceil_mode=True))
        if mask is None:
            return mean, None
        share = from_grid(F.avg_pool2d(to_grid(mask.unsqueeze(-1).to(x.dtype), grid), self.stride, ceil_mode=True))
        return mean / share.masked_fill(share == 0, 1.0), share.squeeze(-1) > 0
