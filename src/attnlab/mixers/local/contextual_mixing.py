"""Context-mixing dynamic convolution: kernels of each cell from its affinity to regions of the whole map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.parts.conv_bn import ConvBN
from attnlab.mixers.parts.grid_pooling import pool_grid
from attnlab.ops.aggregation import neighborhood_aggregation


@mixers.register(
    "contextual_mixing",
    family="local",
    paper="overlock",
    supports=Supports(grid=frozenset({2}), mixing_matrix=True, batch_coupled=True, cost=1.0),
    example={"window": 3, "small_window": 1, "regions": 2},
)
class ContextualMixing(Mixer):
    r"""Depthwise kernels of two sizes, predicted for every cell from pooled context (Lou and Yu 2025, OverLoCK, ContMix).

    With queries $Q = \mathrm{BN}(W_q X)$ of C / 2 channels, keys $K = \mathrm{BN}(W_k\,\mathrm{pool}(X))$ of S regions in each
    direction, values $V = \mathrm{BN}(W_v X)$, G groups of channels, and $d = C / G$, for one group

    $$[D^s, D^l] = (d^{-1/2} Q K^\top)\,W + b, \qquad
      y_i = \sum_{j \in N_k(i)} \mathrm{softmax}_j(D_{i, j} + B_{j - i})\, v_j, \qquad Y = \mathrm{BN}(W_o\,y)$$

    W, shared by all groups, turns the affinities to the $S^2$ regions into the $s^2$ weights of a small and the $k^2$ of a large
    window, which are normalised apart and have tables B of their own. The first half of the heads has the small windows, the
    other half the large ones; heads h and h + G of the 2 G heads share the queries and keys of a group. Windows are shifted
    inwards at borders. Where the shorter side is below the larger window, queries and values are resized so that it is as long
    (bilinearly, the other side in proportion), and the outputs are averaged back. Time O(n ((k^2 + s^2) C + C^2)), memory
    O(n (C + k^2 G)).

    Masked cells are in no region and in no window; a region without a real cell has no influence.

    Args:
        dim: C, width of the tokens.
        num_heads: 2 G, even; four times the number that the authors' code is given.
        causal: always False.
        window: k.
        small_window: s.
        regions: S.
        context_channels: the last channels of the tokens, from which keys are made, and queries from the others alone: the fused
            maps of the authors' network. By default both read all of them.
        project_values: False takes the tokens themselves as values, as in the authors' network.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an odd number of heads, or sizes out of range.
        UnsupportedError: with ``causal=True``, or without a grid of rank 2.

    Differs from the paper: what is resized are queries and values, not the tokens that they are made of, and regions are always
    those of the given map. The depthwise convolution, gate and channel attention around it in the authors' block are no part of
    it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        window: int = 7,
        small_window: int = 5,
        regions: int = 7,
        context_channels: int | None = None,
        project_values: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if num_heads % 2:
            raise ValueError(f"num_heads: expected an even number, got {num_heads}")
        for name, value in (("window", window), ("small_window", small_window), ("regions", regions)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if context_channels is not None and not 0 < context_channels < dim:
            raise ValueError(f"context_channels: expected 1 to dim - 1 = {dim - 1}, got {context_channels}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.windows, self.regions, self.context_channels = (small_window, window), regions, context_channels
        reading = (dim, dim) if context_channels is None else (dim - context_channels, context_channels)
        self.q_proj, self.k_proj = (ConvBN(width, dim // 2, **place) for width in reading)
        self.v_proj = ConvBN(dim, dim, **place) if project_values else None
        self.kernel_proj = nn.Linear(regions**2, small_window**2 + window**2, **place)
        self.tables = nn.ParameterList(
            nn.Parameter(torch.empty(num_heads // 2, 2 * side - 1, 2 * side - 1, **place)) for side in self.windows
        )
        for table in self.tables:
            nn.init.trunc_normal_(table, std=0.02)
        self.out_proj = ConvBN(dim, dim, **place)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Predict the kernels, mix the values, project."""
        values = x if self.v_proj is None else self.v_proj(x, grid, masks.query)
        v = rearrange(values, "b n (h d) -> b h n d", h=self.num_heads)
        heads = self._mixed(x, v, masks.query, grid)
        self.emit("values", v)
        self.emit("mixed", heads)
        return self.out_proj(rearrange(heads, "b h n d -> b n (h d)"), grid, masks.query)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What the kernels make of identity values."""
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        eye = eye if masks.query is None else eye * masks.query[:, None, :, None]
        return self._mixed(x, eye.expand(x.shape[0], self.num_heads, -1, -1), masks.query, grid)

    def _mixed(
        self, x: Float[Tensor, "b n c"], v: Float[Tensor, "b h n e"], mask: Bool[Tensor, "b n"] | None, grid: Grid
    ) -> Float[Tensor, "b h n e"]:
        """The values by the kernels that ``x`` predicts, on a map that holds the windows."""
        c = self.context_channels
        q = self.q_proj(x if c is None else x[..., :-c], grid, mask)
        pooled, alive = pool_grid(x if c is None else x[..., -c:], mask, grid, (self.regions, self.regions))
        k = self.k_proj(pooled, (self.regions, self.regions), alive)
        room = _room(grid, max(self.windows))
        flat = rearrange(v, "b h n e -> b n (h e)")
        if room != grid:
            (q, real), (flat, _) = _resize(q, mask, grid, room), _resize(flat, mask, grid, room)
        else:
            real = mask
        heads = rearrange(flat, "b n (h e) -> b h n e", h=self.num_heads).chunk(2, dim=1)
        kernels = zip(self._kernels(q, k, real, room), heads, self.windows, strict=True)
        mixed = [neighborhood_aggregation(w, part, grid=room, window=side, border="shifted") for w, part, side in kernels]
        out = torch.cat(mixed, dim=1)
        if room == grid:
            return out
        pooled, _ = pool_grid(rearrange(out, "b h n e -> b n (h e)"), real, room, (grid[0], grid[1]))
        return rearrange(pooled, "b n (h e) -> b h n e", h=self.num_heads)

    def _kernels(
        self, q: Float[Tensor, "b n c"], k: Float[Tensor, "b s c"], mask: Bool[Tensor, "b n"] | None, grid: Grid
    ) -> list[Float[Tensor, "b g n k"]]:
        """The weights of the small and of the large windows."""
        groups = self.num_heads // 2
        q, k = (rearrange(t, "b n (g d) -> b g n d", g=groups) for t in (q, k))
        # The kernels' projection is of the regions, and goes to the few keys before the many queries.
        keys = self.kernel_proj.weight @ k * (self.dim // groups) ** -0.5
        logits = (q @ keys.mT + self.kernel_proj.bias).split([side**2 for side in self.windows], dim=-1)
        found = []
        for part, table, side in zip(logits, self.tables, self.windows, strict=True):
            offsets, cells = (index.to(q.device) for index in _places(grid, side))
            part = part + table.flatten(1)[:, offsets]
            if mask is None:
                found.append(part.softmax(-1))
                continue
            # The lowest number, so that a cell that sees nothing has no nan.
            left_out = ~mask[:, cells].unsqueeze(1)
            weights = part.masked_fill(left_out, torch.finfo(part.dtype).min).softmax(-1)
            found.append(weights.masked_fill(left_out, 0.0))
        return found


def _places(grid: Grid, side: int) -> tuple[Int[Tensor, "n k"], Int[Tensor, "n k"]]:
    """For each place of a cell's window: its offset as a row of the flat table, and its cell."""
    offset, cell = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    for size in grid:
        here = torch.arange(size)[:, None]
        keys = (here - side // 2).clamp(0, size - side) + torch.arange(side)
        apart = keys - here + side - 1
        offset, cell = (
            (before[:, None, :, None] * step + along[:, None]).flatten(2).flatten(0, 1)
            for before, step, along in ((offset, 2 * side - 1, apart), (cell, size, keys))
        )
    return offset, cell


def _room(grid: Grid, side: int) -> Grid:
    """The grid, or a larger one of its proportions whose shorter side is ``side``."""
    short = min(grid)
    return grid if short >= side else tuple(n * side // short for n in grid)


def _resize(
    x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, grid: Grid, to: Grid
) -> tuple[Float[Tensor, "b m c"], Bool[Tensor, "b m"] | None]:
    """Bilinear interpolation between the real cells of a map, and which new cells have any; ``x`` is 0 at the others."""
    mean = from_grid(F.interpolate(to_grid(x, grid), to, mode="bilinear"))
    if mask is None:
        return mean, None
    share = from_grid(F.interpolate(to_grid(mask.unsqueeze(-1).to(x.dtype), grid), to, mode="bilinear"))
    return mean / share.masked_fill(share == 0, 1.0), share.squeeze(-1) > 0
