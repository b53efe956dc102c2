"""Window attention: softmax attention inside each window of a grid, shifted or not."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.tilings import boxes
from attnlab.core.windows import Windows
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.parts.tiled_attention import TiledAttention
from attnlab.mixers.parts.zero_tokens import mix_with_zero_tokens


@mixers.register(
    "window",
    family="local",
    supports=Supports(grid=frozenset({1, 2, 3}), mixing_matrix=True, cost=1.0),
    example={"window": 3},
)
class WindowAttention(TiledAttention):
    r"""Softmax attention among the tokens of each window (Liu et al. 2021, Swin, section 3.2; DaViT's spatial attention).

    The grid is cut into windows of ``window`` cells a side and each attends to itself. Shifted windows begin ``shift`` cells
    earlier, and those at the borders are smaller: what Swin computes by a cyclic shift and masks. Time O(n w^r d) on a grid of
    rank r.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        window: side of a window in cells.
        shift: cells by which the windows begin before the grid; half a window in every other layer of Swin.
        border: what cells outside the grid are where the side is no multiple: "masked", or "zero_tokens" (DaViT's code: zero
            inputs, which take part in the softmax; `mixing_matrix` shows the masked form).
        **options: those of `AttentionMixer`; ``position`` may be a bias of pairs on the window's own grid.

    Raises:
        ValueError: for a window below 1, a shift outside of 0 to window - 1, an unknown border, or a position of another kind.
        UnsupportedError: with ``causal=True``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        window: int = 7,
        shift: int = 0,
        border: str = "masked",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        if not 0 <= shift < window:
            raise ValueError(f"shift: expected 0 to window - 1 = {window - 1}, got {shift}")
        if border not in ("masked", "zero_tokens"):
            raise ValueError(f"border: expected 'masked' or 'zero_tokens', got {border!r}")
        self.window, self.shift, self.border = window, shift, border

    def tiles(self, grid: Grid) -> tuple[Int[Tensor, "t x"], Int[Tensor, "t y"]]:
        """Windows; those at a border hold -1."""
        sides = (self.window,) * len(grid)
        cells = boxes(grid, sides, starts=(-self.shift,) * len(grid))
        return cells, cells

    def term(self, q: Float[Tensor, "b h n d"], grid: Grid) -> tuple[Float[Tensor, "#h kinds x y"] | None, Tensor | None]:
        """The position on the window's grid."""
        return self.inside(q, (self.window,) * len(grid)), None

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Project, attend inside windows, project back; zero tokens are there first."""
        if self.border == "masked":
            return super().mix(x, context, masks, grid)
        return mix_with_zero_tokens(super().mix, x, masks, grid, Windows(grid, (self.window,) * len(grid)).padded)
