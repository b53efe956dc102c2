"""Attention along one axis of a table of tokens: among the parts of an instance, or among instances part by part."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.tilings import boxes
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.parts.tiled_attention import TiledAttention


@mixers.register(
    "group_axes",
    family="partitioned",
    paper="group-pose",
    also=("loconet",),
    supports=Supports(grid=frozenset({2, 3}), mixing_matrix=True, cost=1.5),
)
class GroupAxes(TiledAttention):
    r"""Softmax attention along one axis of the grid (Liu et al. 2023, Group Pose, section 3.2; Wang et al. 2023, LoCoNet).

    On a table of instances and slots, $N(i)$ being the tokens that differ from i along the axis alone,

    $$o_i = \sum_{j \in N(i)} \mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j)\, v_j$$

    The last axis is Group Pose's attention within an instance, axis 0 that across instances, a slot at a time; two blocks with
    the norm behind are one self-attention of its decoder. On a table of speakers and frames the last axis is LoCoNet's long-term
    attention of each speaker. Each is equal to dense attention with a mask of blocks. Time O(n s d) for an axis of side s,
    memory O(n d).

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        axis: of the grid; negative ones count from the last.
        **options: those of `AttentionMixer`; ``position`` may be "none", or a bias of pairs on a sequence of the axis' length.

    Raises:
        ValueError: for an axis that no grid of rank 3 has, or a position of another kind.
        UnsupportedError: with ``causal=True``, and for a grid that has no such axis.

    Differs from the papers: Group Pose adds a position embedding to queries and keys of the last axis (its code to the values and
    the stream too, in place); add it to the tokens for what the code does.
    """

    axis = -1

    def __init__(self, dim: int, num_heads: int = 8, *, axis: int = -1, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        if not -3 <= axis < 3:
            raise ValueError(f"axis: expected -3 to 2, got {axis}")
        if self.position.reads_values or self.position_name == "rotary":
            raise ValueError(f"position: expected 'none' or a bias of pairs, got {self.position_name!r}")
        self.axis = axis

    @property
    def supports(self) -> Supports:
        """Grids that have the axis."""
        least = self.axis + 1 if self.axis >= 0 else -self.axis
        return replace(self.info.supports, grid=frozenset(rank for rank in self.info.supports.grid if rank >= least))

    def tiles(self, grid: Grid) -> tuple[Int[Tensor, "t x"], Int[Tensor, "t y"]]:
        """Lines along the axis."""
        axis = self.axis % len(grid)
        cells = boxes(grid, [side if i == axis else 1 for i, side in enumerate(grid)])
        return cells, cells

    def term(self, q: Float[Tensor, "b h n d"], grid: Grid) -> tuple[Float[Tensor, "#h kinds x y"] | None, Tensor | None]:
        """The position along the axis."""
        return self.inside(q, (grid[self.axis % len(grid)],)), None
