"""Long and short distance attention: groups of neighbours, or groups of cells at an interval."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.tilings import product
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.parts.tiled_attention import TiledAttention

DISTANCES = ("short", "long")
PADDING = ("end", "both")


def interval_segments(size: int, side: int, interval: int, start: int = 0) -> Int[Tensor, "t x"]:
    """One axis in stretches of ``side * interval`` cells, and of each stretch the cells that are ``interval`` apart.

    Args:
        size: cells along the axis.
        side: cells of a group.
        interval: between them.
        start: where the first stretch begins, 0 or before.
    """
    stretch = side * interval
    firsts = torch.arange(start, size, stretch)[:, None] + torch.arange(interval)
    cells = firsts.flatten()[:, None] + interval * torch.arange(side)
    return cells.masked_fill((cells < 0) | (cells >= size), -1)


@mixers.register(
    "long_short_distance",
    family="local",
    paper="crossformer",
    supports=Supports(grid=frozenset({1, 2, 3}), mixing_matrix=True, cost=1.0),
    example={"group": 3},
)
class LongShortDistanceAttention(TiledAttention):
    r"""Attention in groups of G cells an axis, near or far (Wang et al. 2021, CrossFormer, section 3.2): ``distance`` says which.

    $$O_T = \mathrm{softmax}\big(d^{-1/2}\, Q_T K_T^\top + B\big)\, V_T$$

    for each group T. "short" (SDA): G neighbours along each axis. "long" (LDA): an axis is cut into stretches of G I cells, and
    cells $y, y + I, \dots, y + (G - 1) I$ of a stretch are a group. Layers alternate, short first. Time O(n G^r d) on a grid of
    rank r, whatever the interval.

    Where the shortest side of an image or volume is G or less, groups are "short" and G is that side, as in the authors' code;
    for a sequence there is no such rule, since its padding would decide it.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        distance: "short" or "long".
        group: G, 7 in the paper.
        interval: I; 8, 4, 2, 1 in the paper's four stages. Not used by "short".
        padding: where a grid is extended to a multiple: at the "end" of each axis, or at "both" ends, one cell more at the end
            where the number is odd. Cells there are no keys.
        **options: those of `AttentionMixer`; ``position`` may be a bias of pairs on a grid of G cells a side. The paper has
            ``qkv_bias`` and ``position="dynamic_mlp"``.

    Raises:
        ValueError: for an unknown distance or padding, a group or interval below 1, or a position of another kind.
        UnsupportedError: with ``causal=True``, or for a sequence with padding at both ends, which would move its groups.

    Differs from the paper: what lies beyond the grid is left out of the softmax, where the authors add -1e6 to its logits.
    """

    padding: str = "end"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        distance: str = "short",
        group: int = 7,
        interval: int = 2,
        padding: str = "end",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if distance not in DISTANCES:
            raise ValueError(f"distance: expected one of {DISTANCES}, got {distance!r}")
        if group < 1 or interval < 1:
            raise ValueError(f"group, interval: expected at least 1, got {group} and {interval}")
        if padding not in PADDING:
            raise ValueError(f"padding: expected one of {PADDING}, got {padding!r}")
        self.distance, self.group, self.interval, self.padding = distance, group, interval, padding

    @property
    def supports(self) -> Supports:
        """With padding at both ends no sequences."""
        found = self.info.supports
        return found if self.padding == "end" else replace(found, grid=found.grid - {1})

    def group_on(self, grid: Grid) -> tuple[int, int]:
        """G and the interval between the cells of a group on this grid."""
        if len(grid) > 1 and min(grid) <= self.group:
            return min(grid), 1
        return self.group, self.interval if self.distance == "long" else 1

    def tiles(self, grid: Grid) -> tuple[Int[Tensor, "t x"], Int[Tensor, "t y"]]:
        """Groups of neighbours, or of cells at the interval; -1 beyond the grid."""
        side, interval = self.group_on(grid)
        starts = [-(-n % (side * interval) // 2) if self.padding == "both" else 0 for n in grid]
        cells = product([interval_segments(n, side, interval, s) for n, s in zip(grid, starts, strict=True)], grid)
        return cells, cells

    def term(self, q: Float[Tensor, "b h n d"], grid: Grid) -> tuple[Float[Tensor, "#h kinds x y"] | None, Tensor | None]:
        """The position on a grid of G cells a side."""
        return self.inside(q, (self.group_on(grid)[0],) * len(grid)), None
