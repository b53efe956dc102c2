"""Criss-cross attention: each cell of a grid attends to the cells of its own row and column, and does so again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.ops.partials import Partial, merge
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention


@mixers.register(
    "criss_cross",
    family="local",
    paper="ccnet",
    supports=Supports(grid=frozenset({2, 3}), mixing_matrix=True, cost=1.5),
    example={"passes": 1},
)
class CrissCrossAttention(Mixer):
    r"""Softmax over a cell's row and column, repeated (Huang et al. 2018, CCNet, sections 3.2 and 3.3).

    On a grid, with $S_u$ the cells that differ from u along one axis at most, u itself once (H + W - 1 of them on a map, and
    H + W + T - 2 on a video):

    $$z_u = \sum_{s \in S_u} \mathrm{softmax}_{s \in S_u}(q_u^\top k_s)\, v_s \qquad Y = \gamma Z + X \qquad
      Y^{(r+1)} = \mathrm{CCA}(Y^{(r)}),\quad Y^{(0)} = X$$

    One softmax over all of $S_u$, without a scale; the authors have one head, and queries and keys of C / 8 channels. $\gamma$ is
    0 at first, so that a fresh layer is the identity: the residual branch belongs to the mechanism. All passes share all weights.
    After one pass a cell knows its cross, after as many as the grid has axes every cell: (a, b) reaches (i, j) through (a, j) and
    (i, b). A line of each axis is a tile, and the parts are merged by their log-sum-exp: time O(n (H + W) C) a pass,
    memory O(n C).
    ``record`` collects "values", "mixed" and "attention" of the last pass, and "composed", the product of the maps of all.

    Args:
        dim: C, width of the tokens.
        num_heads: heads.
        causal: always False.
        passes: how many, R of the paper.
        reduction: C over the channels of all queries or keys, which have at least one channel a head.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a number below 1.
        UnsupportedError: with ``causal=True``; without a grid of rank 2 or 3; for a mixing matrix of several passes.

    Differs from the paper: the convolutions around it in CCNet's head are no part of it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        passes: int = 2,
        reduction: int = 8,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        for name, value in (("passes", passes), ("reduction", reduction)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.passes = passes
        inner = num_heads * max(1, dim // (reduction * num_heads))
        self.q_proj, self.k_proj = nn.Linear(dim, inner, **place), nn.Linear(dim, inner, **place)
        self.v_proj = nn.Linear(dim, dim, **place)
        self.gamma = nn.Parameter(torch.zeros((), **place))

    @property
    def supports(self) -> Supports:
        """Several passes have no map of their own between the tokens that come in and the values."""
        found = self.info.supports
        return found if getattr(self, "passes", 1) == 1 else replace(found, mixing_matrix=False)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """The passes, each with its residual branch."""
        given = x
        for _ in range(self.passes - 1):
            x = x + self._update(x, masks, grid)[1]
        (v, heads), update = self._update(x, masks, grid)
        self.emit("values", v)
        self.emit("mixed", heads)
        self.emit("attention", lambda: self.matrix(x, None, masks, grid))
        self.emit("composed", lambda: self._composed(given, masks, grid))
        return x + update

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The weights of one pass: what they make of identity values."""
        q, k, _ = self._project(x)
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(*q.shape[:2], -1, -1)
        return attend_cross(q, k, eye, masks, grid)

    def _composed(self, x: Float[Tensor, "b n c"], masks: Masks, grid: Grid) -> Float[Tensor, "b h n n"]:
        """The product of the maps of all passes, the last one leftmost."""
        found = self.matrix(x, None, masks, grid)
        for _ in range(self.passes - 1):
            x = x + self._update(x, masks, grid)[1]
            found = self.matrix(x, None, masks, grid) @ found
        return found

    def _update(
        self, x: Float[Tensor, "b n c"], masks: Masks, grid: Grid
    ) -> tuple[tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]], Float[Tensor, "b n c"]]:
        """The values of a pass and what becomes of them, and what is added to the tokens."""
        q, k, v = self._project(x)
        heads = attend_cross(q, k, v, masks, grid)
        return (v, heads), self.gamma * rearrange(heads, "b h n d -> b n (h d)")

    def _project(
        self, x: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n e"]]:
        q, k, v = (
            rearrange(proj(x), "b n (h d) -> b h n d", h=self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v


def attend_cross(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"], masks: Masks, grid: Grid
) -> Float[Tensor, "b h n e"]:
    """One softmax over the lines of all axes through each cell; the cell itself is a key of the last axis alone."""
    total: Partial | None = None
    for axis, side in enumerate(grid):
        lines = torch.arange(q.shape[2], device=q.device).view(grid).movedim(axis, -1).reshape(-1, side)
        itself = torch.eye(side, dtype=torch.bool, device=q.device)
        bias = None if axis == len(grid) - 1 else q.new_zeros(1, 1, side, side).masked_fill(itself, float("-inf"))
        tiles = lines[None, None]
        output, lse = tile_attention(q, k, v, tiles, tiles, bias=bias, key_mask=masks.key, scale=1.0)
        inverse = places_of(lines, q.shape[2])
        part = Partial(from_tiles(output, inverse), lse.flatten(2).index_select(2, inverse))
        total = part if total is None else merge(total, part)
    return q.new_zeros(v.shape) if total is None else total.output.to(v.dtype)
