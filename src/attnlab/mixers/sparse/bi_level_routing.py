"""Bi-level routing attention: regions of a grid choose regions, tokens attend inside the chosen ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.tilings import boxes
from attnlab.mixers.attention import AttentionMixer
from attnlab.mixers.parts.selection import top_k
from attnlab.mixers.parts.zero_tokens import mix_with_zero_tokens
from attnlab.ops.partials import Partial, merge
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention


class Routes(NamedTuple):
    """What the regions of a grid choose.

    Args:
        cells: the cells of each region, -1 beyond the grid.
        chosen: the regions that each one reads, best first, -1 for none.
        weights: the softmax of their affinities, 0 for none.
    """

    cells: Int[Tensor, "t x"]
    chosen: Int[Tensor, "b t j"]
    weights: Float[Tensor, "b t j"]

    def keys(self, rank: slice) -> Int[Tensor, "b 1 t y"]:
        """The cells of the chosen regions of these ranks, one region behind the other."""
        chosen = self.chosen[:, :, rank]
        cells = self.cells[chosen.clamp(min=0)].masked_fill((chosen < 0).unsqueeze(-1), -1)
        return cells.flatten(2).unsqueeze(1)


@mixers.register(
    "bi_level_routing",
    family="sparse",
    paper="biformer",
    supports=Supports(grid=frozenset({2}), mixing_matrix=True, discontinuous=True, cost=2.0),
    example={"num_regions": 3, "num_routed": 2},
)
class BiLevelRoutingAttention(AttentionMixer):
    r"""Attention of each region of a grid to the k regions whose mean keys fit its mean query (Zhu et al. 2023, BiFormer).

    $$A = s\, \bar Q \bar K^\top, \qquad I_r = \mathrm{top}_k(A_r), \qquad
      O_i = \sum_{j \in I_{r(i)}} \mathrm{softmax}_j(s\, q_i^\top k_j)\, v_j, \qquad Y = (O + \mathrm{LePE}(V))\, W_o + b_o$$

    The grid is cut into S x S regions, $\bar Q, \bar K \in \mathbb{R}^{S^2 \times c}$ are means over a region's real tokens, of
    all heads side by side, so that all heads choose alike. No gradient passes the choice. $s = c^{-1/2}$ with the whole width c
    of the queries, in each head too. LePE is a depthwise convolution of the values on the whole grid. With k = S^2 this is dense
    attention. Time O(S^4 c + n^2 k / S^2 c); memory O(n c).

    ``record`` collects "selection" (b, S^2, k), -1 for none, and "routing_weights" likewise.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        num_regions: S, regions a side.
        num_routed: k; all where there are fewer.
        soft_routing: keys and values of the j-th chosen region are multiplied by the softmax over the k kept affinities.
        qk_dim: c, by default ``dim``.
        lepe_kernel: side of LePE's kernel, odd; 0 for none.
        border: cells outside of the grid, where S divides no side: "masked", or "zero_tokens", zero inputs that are projected,
            are part of the means and are attended to (the released code; `mixing_matrix` shows the masked form).
        qkv_bias: biases in the input projections.
        out_bias: bias in the output projection.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for numbers below 1, a ``qk_dim`` that the heads do not divide, an even kernel or an unknown border.
        UnsupportedError: with ``causal=True``: a region's choice reads all its tokens.

    Differs from the paper: masked tokens are in no mean and no softmax. Keys are not downsampled, the descriptors have no
    projection of their own, and the choice has no gradient (options that the released models leave off).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        num_regions: int = 7,
        num_routed: int = 4,
        soft_routing: bool = False,
        qk_dim: int | None = None,
        lepe_kernel: int = 5,
        border: str = "masked",
        qkv_bias: bool = True,
        out_bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        local: dict[str, Any] = {"position": "none"}
        if lepe_kernel:
            local = {"position": "lepe", "position_options": {"kernel_size": lepe_kernel}}
        super().__init__(dim, num_heads, causal=causal, qkv_bias=qkv_bias, out_bias=out_bias, **local, **place)
        for name, value in (("num_regions", num_regions), ("num_routed", num_routed)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if border not in ("masked", "zero_tokens"):
            raise ValueError(f"border: expected 'masked' or 'zero_tokens', got {border!r}")
        self.qk_dim = dim if qk_dim is None else qk_dim
        if self.qk_dim < 1 or self.qk_dim % num_heads:
            raise ValueError(f"qk_dim: expected a positive multiple of num_heads={num_heads}, got {qk_dim}")
        if self.qk_dim != dim:
            self.q_proj = nn.Linear(dim, self.qk_dim, bias=qkv_bias, **place)
            self.k_proj = nn.Linear(dim, self.qk_dim, bias=qkv_bias, **place)
        self.num_regions, self.num_routed, self.soft_routing, self.border = num_regions, num_routed, soft_routing, border

    def regions(self, grid: Grid) -> Grid:
        """The sides of a region."""
        return tuple(-(-side // self.num_regions) for side in grid)

    def project(
        self, x: Float[Tensor, "b n c"], context: Tensor | None = None, index: Int[Tensor, "#b n"] | None = None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n e"]]:
        """Queries and keys of ``qk_dim`` channels, values of ``dim``."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (rearrange(layer(x), "b n (h d) -> b h n d", h=self.num_heads) for layer in layers)
        return q, k, v

    @torch.no_grad()
    def route(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], mask: Bool[Tensor, "b n"] | None, grid: Grid
    ) -> Routes:
        """The regions that each region reads."""
        cells = boxes(grid, self.regions(grid)).to(q.device)
        real = (cells >= 0).expand(len(q), -1, -1)
        if mask is not None:
            real = real & mask[:, cells.clamp(min=0)]
        number = real.sum(-1)
        means = []
        for x in (q, k):
            tokens = x.transpose(1, 2).flatten(2)[:, cells.clamp(min=0)].masked_fill(~real.unsqueeze(-1), 0.0)
            means.append(tokens.sum(2) / number.clamp(min=1).unsqueeze(-1).to(x.dtype))
        affinity = (means[0] * self.qk_dim**-0.5) @ means[1].mT
        chosen = top_k(affinity, self.num_routed, (number > 0).unsqueeze(1).expand_as(affinity))
        kept = affinity.take_along_dim(chosen.clamp(min=0), 2).masked_fill(chosen < 0, float("-inf"))
        # a region without anything to choose has weights of 0, not nan
        weights = kept.masked_fill((chosen < 0).all(-1, keepdim=True), 0.0).softmax(-1).masked_fill(chosen < 0, 0.0)
        return Routes(cells, chosen, weights)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the tokens of the chosen regions."""
        routes = self.route(q, k, masks.key, grid or (1, q.shape[2]))
        self.emit("selection", routes.chosen)
        self.emit("routing_weights", routes.weights)
        queries, inverse = routes.cells[None, None], places_of(routes.cells, q.shape[2])
        scale = self.qk_dim**-0.5
        if not self.soft_routing:
            keys = routes.keys(slice(None))
            return from_tiles(tile_attention(q, k, v, queries, keys, key_mask=masks.key, scale=scale).output, inverse)
        # A factor on a region's keys is one on the queries that read them; so each rank is a part by itself.
        region = torch.div(inverse, routes.cells.shape[1], rounding_mode="floor")
        parts = []
        for rank in range(routes.chosen.shape[2]):
            factor = routes.weights[:, region, rank][:, None, :, None].to(q.dtype)
            found = tile_attention(q * factor, k, v, queries, routes.keys(slice(rank, rank + 1)), key_mask=masks.key, scale=scale)
            lse = found.lse.flatten(2).index_select(2, inverse)
            parts.append(Partial(from_tiles(found.output, inverse) * factor, lse))
        total = parts[0]
        for part in parts[1:]:
            total = merge(total, part)
        return total.output

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Project, route, attend, project back; zero tokens are there first."""
        if self.border == "masked":
            return super().mix(x, context, masks, grid)
        # As in the released code up to S regions a side may be padding alone.
        padded = tuple(self.num_regions * side for side in self.regions(grid))
        return mix_with_zero_tokens(super().mix, x, masks, grid, padded)
