"""Generalised neighbourhood attention: the nearest keys on a grid, strided, dilated or causal on any axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.first_real import from_first_real
from attnlab.mixers.parts.zero_tokens import mix_with_zero_tokens
from attnlab.ops.tile_attention.neighborhood import Axis, axes_of, neighborhood_attention
from attnlab.ops.tile_attention.neighborhood.by_length import attend_by_length

Sides = int | Sequence[int]
SHORT_AXES = ("shrunk", "zero_tokens", "refused")


@mixers.register(
    "neighborhood",
    family="local",
    paper="generalized-neighborhood-attention",
    also=("faster-neighborhood-attention", "dilated-neighborhood-attention"),
    supports=Supports(causal="optional", grid=frozenset({1, 2, 3}), mixing_matrix=True, cost=1.0),
    example={"window": 3},
)
class NeighborhoodAttention(AttentionMixer):
    r"""Softmax attention to the nearest cells of a grid (Hassani et al. 2025, arXiv 2504.16922; 2024, 2403.04690).

    $$o_i = \sum_{j \in N(i)} \mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j + B_{j-i})\, v_j$$

    N(i) are w cells along each axis, in steps of the dilation, shared by stride neighbouring queries and shifted inwards at the
    borders, so that no query sees fewer; see `attnlab.ops.neighborhoods.Axis`. Stride 1 and dilation 1 is
    neighbourhood attention, a dilation that of DiNAT (Hassani and Shi 2022, arXiv 2209.15001), stride = window attention inside
    blocks, and a window as large as the grid dense attention. Time O(n w^r d), memory O(n d) on a grid of rank r.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        window: w; one number for all axes, or one an axis.
        stride: neighbouring queries that share a window, likewise; at most the window.
        dilation: distance of the keys of a window, likewise.
        causal_axes: axes along which no later cell is seen, such as (True, False, False) for the frames of a video; ``causal``
            makes it all of them.
        relative_bias: a learned B a head and offset, (h, 2 w - 1, ...), normal with deviation 0.02.
        rank: of the grid that the bias is for; given by ``window`` where that names every axis.
        short_axes: what happens where window * dilation exceeds an axis: "shrunk", the dilation and then the window become what
            fits; "zero_tokens", zero inputs are appended and take part (DiNAT); or "refused".
        **options: those of `AttentionMixer`; ``position`` must be one of queries and keys alone.

    Raises:
        ValueError: for sizes that do not fit each other, a position of another kind, or (where refused) a short axis.
        UnsupportedError: for a grid of another rank than sizes or bias are for.

    Differs from the papers: with a stride above 1 and causality, the queries of a last, incomplete stride group see further back
    than they would if more tokens followed (so it is defined); there is no stream for that reason, `sliding_window` has one.
    """

    rank: int | None = None
    table: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        window: Sides = 7,
        stride: Sides = 1,
        dilation: Sides = 1,
        causal_axes: Sequence[bool] | None = None,
        relative_bias: bool = False,
        rank: int | None = None,
        short_axes: str = "shrunk",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        given = {"window": window, "stride": stride, "dilation": dilation, "causal_axes": causal_axes}
        ranks = {len(value) for value in given.values() if isinstance(value, Sequence)} | ({rank} if rank else set())
        if len(ranks) > 1 or not ranks <= {1, 2, 3}:
            raise ValueError(f"rank: expected one of 1, 2, 3 for all of {', '.join(given)} and rank, got {sorted(ranks)}")
        if relative_bias and not ranks:
            raise ValueError("rank: expected the rank of the grid that relative_bias is for, got None")
        if short_axes not in SHORT_AXES:
            raise ValueError(f"short_axes: expected one of {SHORT_AXES}, got {short_axes!r}")
        self.rank = ranks.pop() if ranks else None
        self.window, self.stride, self.dilation, self.short_axes = window, stride, dilation, short_axes
        self.causal_axes = self.causal if causal_axes is None or self.causal else tuple(causal_axes)
        self._refuse_bad_sizes()
        self.register_parameter("table", None)
        if relative_bias:
            shape = tuple(2 * axis.window - 1 for axis in self._wanted((2**30,) * (self.rank or 1)))
            self.table = nn.Parameter(torch.empty(num_heads, *shape, device=options.get("device"), dtype=options.get("dtype")))
            nn.init.trunc_normal_(self.table, std=0.02)

    @property
    def supports(self) -> Supports:
        """With sizes an axis or a bias, grids of that rank alone."""
        found = self.info.supports
        return found if self.rank is None else replace(found, grid=frozenset({self.rank}))

    def axes(self, grid: Grid) -> tuple[Axis, ...]:
        """The rules on this grid.

        Raises:
            ValueError: for a short axis where these are refused.
        """
        if self.short_axes == "refused":
            return self._wanted(grid)
        wanted = self._wanted((2**30,) * len(grid))
        return tuple(Axis.fitted(n, a.window, a.stride, a.dilation, a.causal) for n, a in zip(grid, wanted, strict=True))

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over each query's neighbourhood; a sequence goes from its first real token to its last."""
        grid = grid or (q.shape[2],)
        axes = self.axes(grid)
        if masks.key is not None and len(grid) == 1:
            (rule,) = self._wanted((2**30,))

            def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
                return attend_by_length(q, k, v, mask, rule, self.table, q.shape[-1] ** -0.5)[0]

            return from_first_real(attend, q, k, v, masks.key)
        return neighborhood_attention(
            q,
            k,
            v,
            grid=grid,
            window=[axis.window for axis in axes],
            stride=[axis.stride for axis in axes],
            dilation=[axis.dilation for axis in axes],
            causal=[axis.causal for axis in axes],
            bias=self._bias(axes),
            key_mask=masks.key,
        ).output

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Project, attend, project back; zero tokens are appended first where these are to take part."""
        wanted = self._wanted((2**30,) * len(grid))
        missing = [max(0, axis.window * axis.dilation - side) for axis, side in zip(wanted, grid, strict=True)]
        if self.short_axes != "zero_tokens" or not any(missing):
            return super().mix(x, context, masks, grid)
        padded = tuple(side + more for side, more in zip(grid, missing, strict=True))
        return mix_with_zero_tokens(super().mix, x, masks, grid, padded)

    def _wanted(self, grid: Grid) -> tuple[Axis, ...]:
        return axes_of(grid, self.window, self.stride, self.dilation, self.causal_axes)

    def _refuse_bad_sizes(self) -> None:
        """Raise for sizes that fit no grid, and for positions that act elsewhere than in queries and keys."""
        self._wanted((2**30,) * (self.rank or 1))
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}; relative_bias is a bias here")

    def _bias(self, axes: tuple[Axis, ...]) -> Tensor | None:
        """The table's offsets within these windows, which may be smaller than the table's."""
        if self.table is None:
            return None
        table: Tensor = self.table
        for dim, axis in enumerate(axes, start=1):
            table = axis.table(table, dim)
        return table


def receptive_field(axes: Sequence[Sequence[Axis]]) -> int:
    """The largest number of cells that any cell sees through a stack of layers, each given by its axes."""
    counts = []
    for along in zip(*axes, strict=True):
        seen = torch.eye(along[0].size, dtype=torch.bool)
        for axis in along:
            seen = (axis.visible().float() @ seen.float()) > 0
        counts.append(int(seen.sum(-1).max()))
    return math.prod(counts)
