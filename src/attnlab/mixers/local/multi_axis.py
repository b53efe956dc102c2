"""Multi-axis attention: inside blocks of neighbours, or on a coarse lattice over the whole grid."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.tilings import boxes, interleaved, product
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.parts.tiled_attention import TiledAttention

PARTS = ("block", "grid")


@mixers.register(
    "multi_axis",
    family="local",
    paper="maxvit",
    supports=Supports(grid=frozenset({2, 3}), mixing_matrix=True, cost=1.0),
    example={"part": "grid", "window": 2},
)
class MultiAxisAttention(TiledAttention):
    r"""One of the two halves of multi-axis attention (Tu et al. 2022, MaxViT, section 3.2): ``part`` says which.

    $$O_T = \mathrm{softmax}\big(d^{-1/2}\, Q_T K_T^\top + B\big)\, V_T$$

    for each set T of P cells along every axis. "block": P neighbours; cell y of an axis is in block $\lfloor y / P \rfloor$.
    "grid": P cells spread over the whole axis of N, with stride $s = \lceil N / P \rceil$; cell y is in set $y \bmod s$. One
    layer of each, in that order, lets every cell see every other, at time O(n P^r d) on a grid of rank r.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        part: "block" or "grid".
        window: P, 7 in the paper; its models grow it with the image, so that there are always as many sets.
        **options: those of `AttentionMixer`; ``position`` may be a bias of pairs on a grid of P cells a side. The paper has
            ``qkv_bias`` and ``position="offset_table"`` with ``{"size": P, "direction": "key_minus_query"}``.

    Raises:
        ValueError: for an unknown part, a window below 1, or a position of another kind.
        UnsupportedError: for a sequence, whose padding would set the stride; or with ``causal=True``.

    Differs from the paper: sides that are no multiples of P leave places empty, which are no keys. A table that is read at
    another size is resized bicubically, where the authors' is bilinear. The convolution before the two (MBConv) is a matter of
    the block.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, part: str = "block", window: int = 7, **options: Unpack[AttentionOptions]
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if part not in PARTS:
            raise ValueError(f"part: expected one of {PARTS}, got {part!r}")
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        self.part, self.window = part, window

    def tiles(self, grid: Grid) -> tuple[Int[Tensor, "t x"], Int[Tensor, "t y"]]:
        """Blocks, or lattices of as many cells; -1 where a side has no more."""
        if self.part == "block":
            cells = boxes(grid, (self.window,) * len(grid))
            return cells, cells
        axes = [interleaved(n, -(-n // self.window)) for n in grid]
        # every set has P places an axis, so that one bias fits all
        cells = product([F.pad(axis, (0, self.window - axis.shape[1]), value=-1) for axis in axes], grid)
        return cells, cells

    def term(self, q: Float[Tensor, "b h n d"], grid: Grid) -> tuple[Float[Tensor, "#h kinds x y"] | None, Tensor | None]:
        """The position on a grid of P cells a side."""
        return self.inside(q, (self.window,) * len(grid)), None
