"""Overlapping windows: each window of queries reads a larger window of keys."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.tilings import boxes, product, segments_of
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.parts.tiled_attention import BORDERS, TiledAttention, zero_keys


@mixers.register(
    "overlapping_window",
    family="local",
    paper="hat",
    partial=True,
    supports=Supports(grid=frozenset({1, 2, 3}), mixing_matrix=True, cost=1.0),
    example={"window": 3},
)
class OverlappingWindowAttention(TiledAttention):
    r"""Windows of queries that read the keys of larger, overlapping windows (Chen et al. 2023, HAT, overlapping cross-attention).

    $$O = \mathrm{softmax}\big(d^{-1/2}\, Q K_o^\top + B\big)\, V_o, \qquad M_o = M + \lfloor \gamma M \rfloor$$

    Q (M^r, d) are the queries of a window of M cells a side on a grid of rank r; $K_o, V_o$ (M_o^r, d) those of the window of M_o
    cells a side around it, which begins $\lfloor (M_o - M) / 2 \rfloor$ cells earlier. B is learned a head and offset, key minus
    query. Time O(n M_o^r d), memory O(n d): keys that windows share are not copied for all windows at once.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        window: M, side of a window of queries.
        overlap: $\gamma$, how much longer the sides of a window of keys are, as a share of M.
        relative_bias: whether there is B, (h, M + M_o - 1, ...), normal with deviation 0.02; the paper has it, with rank 2.
        rank: of the grid that the bias is for.
        border: what cells beyond the grid are: "zero_keys", keys and values of zeros that take part in the softmax, with their
            bias (the authors' code), and so are masked tokens then; or "masked".
        **options: those of `AttentionMixer`; ``position`` must be one of queries and keys alone. The paper has ``qkv_bias``.

    Raises:
        ValueError: for a window below 1, a negative overlap, a bias without a rank, an unknown border, or a position of another
            kind.
        UnsupportedError: for a grid of another rank than the bias is for, or with ``causal=True``.

    Differs from the paper: a grid whose sides are no multiples of M has smaller windows of queries at its end, where the authors
    enlarge the image by reflection. Their table's index wraps around, a permutation of this one.
    """

    rank: int | None = None
    table: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        window: int = 16,
        overlap: float | int = 0.5,
        relative_bias: bool = False,
        rank: int | None = None,
        border: str = "zero_keys",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        if overlap < 0:
            raise ValueError(f"overlap: expected 0 or more, got {overlap}")
        if rank not in ((1, 2, 3) if relative_bias else (None, 1, 2, 3)):
            raise ValueError(f"rank: expected 1, 2 or 3, the rank of the grid that relative_bias is for, got {rank}")
        if border not in BORDERS:
            raise ValueError(f"border: expected one of {BORDERS}, got {border!r}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}; relative_bias is a bias here")
        self.window, self.key_window, self.rank, self.border = window, window + int(overlap * window), rank, border
        self.outside = "zero" if border == "zero_keys" else "masked"
        self.register_parameter("table", None)
        if relative_bias and rank is not None:
            sides = (window + self.key_window - 1,) * rank
            self.table = nn.Parameter(torch.empty(num_heads, *sides, device=options.get("device"), dtype=options.get("dtype")))
            nn.init.trunc_normal_(self.table, std=0.02)

    @property
    def supports(self) -> Supports:
        """With a rank, grids of that rank alone."""
        found = self.info.supports
        return found if self.rank is None else replace(found, grid=frozenset({self.rank}))

    def tiles(self, grid: Grid) -> tuple[Int[Tensor, "t x"], Int[Tensor, "t y"]]:
        """Windows, and the larger windows around them."""
        queries = boxes(grid, (self.window,) * len(grid))
        start = -((self.key_window - self.window) // 2)
        axes = [segments_of(n, self.key_window, step=self.window, start=start)[: -(-n // self.window)] for n in grid]
        return queries, product(axes, grid)

    def term(self, q: Float[Tensor, "b h n d"], grid: Grid) -> tuple[Float[Tensor, "#h kinds x y"] | None, Tensor | None]:
        """The table's entry for each pair of a window's cells."""
        if self.table is None:
            return None, None
        rows = offset_rows((self.window,) * len(grid), (self.key_window,) * len(grid)).to(q.device)
        return self.table.flatten(1)[:, rows].unsqueeze(1), None

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the larger window; masked tokens are what lies beyond the border."""
        if self.outside == "zero":
            k, v = zero_keys(k, v, masks.key)
            masks = Masks(masks.query)
        return super().attend(q, k, v, masks, grid)


def offset_rows(query_sides: Grid, key_sides: Grid) -> Int[Tensor, "x y"]:
    """Where the offset of each pair of cells, key minus query, stands in a flat table of (x + y - 1) entries an axis.

    Cells are counted from the beginning of their own box: the first entry is that of the last query and the first key.
    """
    rows = torch.zeros(1, 1, dtype=torch.int64)
    for x, y in zip(query_sides, key_sides, strict=True):
        along = torch.arange(y) - torch.arange(x)[:, None] + x - 1
        rows = (rows[:, None, :, None] * (x + y - 1) + along[:, None]).flatten(2).flatten(0, 1)
    return rows
