"""Foveal attention on a grid: each token's neighbourhood and the pooled map under one softmax."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.mixers.attention import AttentionMixer
from attnlab.mixers.parts.cosine import ScaledCosine
from attnlab.mixers.parts.grid_pooling import pool_grid
from attnlab.mixers.parts.pooled_cpb import PooledCPB
from attnlab.mixers.parts.sliding_boxes import sliding_boxes
from attnlab.ops.aggregation import neighborhood_aggregation
from attnlab.ops.partial_attention import Partial, merge, partial_attention
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention

FOVEAL = Supports(grid=frozenset({2}), cost=1.0)


class FovealOptions(TypedDict, total=False):
    """The options of `FovealAttention` that a subclass hands on unchanged."""

    causal: bool
    qkv_bias: bool
    window: int
    pool: int
    reduction: int | None
    span: int | None
    length_scale: bool
    query_embedding: bool
    positional_weights: bool
    device: torch.device | None
    dtype: torch.dtype | None


class FovealAttention(AttentionMixer):
    r"""The mechanism of `attnlab.mixers.local.aggregated.AggregatedAttention`, which says what it is, for all that build on it.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always False.
        qkv_bias: biases in the three input projections.
        window: k, odd.
        pool: pooled cells a side, at most the side of the grid; at the authors' 224 pixels all stages have 7.
        reduction: instead of ``pool``, the side of what becomes a pooled cell (the authors' sr_ratio): sides are divided by it,
            rounded down, and the cost grows with n^2 / reduction^2.
        span: the side by which the offsets of the pooled cells are divided, that of training; by default that of the grid at
            hand.
        length_scale: whether logits grow with $\ln(|N(i)| + P)$.
        query_embedding: whether there is $e$.
        positional_weights: whether there are $T$ and $u$.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an even window, or a number below 1.
    """

    _promises: Supports | None = None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        qkv_bias: bool = True,
        window: int = 3,
        pool: int = 7,
        reduction: int | None = None,
        span: int | None = None,
        length_scale: bool = True,
        query_embedding: bool = True,
        positional_weights: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, qkv_bias=qkv_bias, device=device, dtype=dtype)
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window: expected an odd positive number, got {window}")
        for name, value in (("pool", pool), ("reduction", reduction), ("span", span)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (num_heads, window * window)
        self.window, self.pool, self.reduction = window, pool, reduction
        if reduction is not None:
            self._promises = replace(self.supports, cost=2.0)
        self.cosine = ScaledCosine(num_heads, self.head_dim, query_embedding=query_embedding, length_scale=length_scale, **place)
        self.window_bias = nn.Parameter(torch.empty(shape, **place))
        nn.init.trunc_normal_(self.window_bias, std=0.0004)
        self.pool_proj, self.pool_norm = nn.Linear(dim, dim, **place), nn.LayerNorm(dim, **place)
        self.pool_bias = PooledCPB(num_heads, self.head_dim, span=span).to(**place)
        self.offset_keys: nn.Parameter | None = None
        self.offset_bias: nn.Parameter | None = None
        if positional_weights:
            self.offset_keys = nn.Parameter(torch.empty(num_heads, self.head_dim, shape[1], **place))
            nn.init.trunc_normal_(self.offset_keys, std=0.02)
            self.offset_bias = nn.Parameter(torch.zeros(num_heads, 1, shape[1], **place))

    @property
    def supports(self) -> Supports:
        """With ``reduction`` the pooled cells grow with the tokens, and the cost with their product."""
        return self.info.supports if self._promises is None else self._promises

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Project, attend to the neighbourhood and the pooled map, project back."""
        q, k, v = self.project(x)
        unit, v = F.normalize(q, dim=-1), v if masks.query is None else v.masked_fill(~masks.query[:, None, :, None], 0.0)
        pooled, alive = self._pool(x, masks.query, grid)
        counts = self._near(x, masks.query, grid) + (pooled.shape[1] if alive is None else alive.sum(dim=1)[:, None, None])
        hot = self.cosine.queries(unit, counts.clamp(min=1)[:, None])
        local = self._local(hot, F.normalize(k, dim=-1), v, masks.query, grid)
        total = merge(local, self._far(hot, pooled, alive, grid))
        self.emit("local_share", lambda: (local.lse - total.lse).exp().nan_to_num(0.0))
        heads = total.output.to(v.dtype)
        keys, bias = self.offset_keys, self.offset_bias
        if keys is not None and bias is not None:
            # The neighbours' values once more, by the weights that the query gives to their offsets.
            heads = heads + neighborhood_aggregation(unit @ keys + bias, v, grid=grid, window=self.window)
        return self.join(heads, x, masks.query)

    def _sides(self, grid: Grid) -> tuple[int, int]:
        """Pooled cells along each axis."""
        if self.reduction is not None:
            return max(1, grid[0] // self.reduction), max(1, grid[1] // self.reduction)
        return min(self.pool, grid[0]), min(self.pool, grid[1])

    def _near(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, grid: Grid) -> Float[Tensor, "b n 1"]:
        """How many real cells each neighbourhood has."""
        real = torch.ones_like(x[..., :1]) if mask is None else mask.unsqueeze(-1).to(x.dtype)
        pool = F.avg_pool2d(to_grid(real, grid), self.window, 1, self.window // 2, divisor_override=1)
        return from_grid(pool)

    def _pool(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, grid: Grid
    ) -> tuple[Float[Tensor, "b p c"], Bool[Tensor, "b p"] | None]:
        """The pooled map, and which of its cells hold a real one."""
        mean, alive = pool_grid(zero_masked(F.gelu(self.pool_proj(x)), mask), mask, grid, self._sides(grid))
        return self.pool_norm(mean), alive

    def _local(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        mask: Bool[Tensor, "b n"] | None,
        grid: Grid,
    ) -> Partial:
        """Attention of each token over its neighbourhood, a box of tokens at a time."""
        boxes = sliding_boxes(grid, (self.window,) * 2)
        queries, keys, bias = boxes.queries.to(q.device), boxes.keys.to(q.device), boxes.bias(self.window_bias)
        output, lse = tile_attention(q, k, v, queries[None, None], keys[None, None], bias=bias, key_mask=mask, scale=1.0)
        inverse = places_of(queries, q.shape[2])
        return Partial(from_tiles(output, inverse), lse.flatten(2).index_select(2, inverse))

    def _far(
        self, q: Float[Tensor, "b h n d"], pooled: Float[Tensor, "b p c"], alive: Bool[Tensor, "b p"] | None, grid: Grid
    ) -> Partial:
        """Attention of each token over the pooled map."""
        k, v = (rearrange(proj(pooled), "b p (h d) -> b h p d", h=self.num_heads) for proj in (self.k_proj, self.v_proj))
        bias = self.pool_bias.between(q, grid, self._sides(grid))
        allowed = None if alive is None else alive[:, None, None]
        return partial_attention(q, F.normalize(k, dim=-1), v, scale=1.0, bias=bias, allowed=allowed)
