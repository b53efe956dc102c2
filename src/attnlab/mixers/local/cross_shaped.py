"""Cross-shaped windows: half of the heads attend in vertical stripes, the other half in horizontal ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.core.tilings import boxes
from attnlab.core.windows import Windows
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention
from attnlab.positions.lepe import LocallyEnhancedPosition


@mixers.register(
    "cross_shaped",
    family="local",
    paper="cswin",
    supports=Supports(grid=frozenset({2}), mixing_matrix=True, cost=1.5),
    example={"stripe": 2},
)
class CrossShapedAttention(AttentionMixer):
    r"""Attention inside stripes, vertical and horizontal ones side by side (Dong et al. 2021, CSWin, sections 3.2 and 3.3).

    $$O_T = \mathrm{softmax}\big(d^{-1/2}\, Q_T K_T^\top\big)\, V_T + \mathrm{DWConv}_{3 \times 3}(V_T)$$

    for each stripe T: on an H x W map the first half of the heads has stripes of H rows and sw columns, the second half sw rows
    and W columns, so that a token sees a cross. Of an odd number of heads the vertical stripes have one more. The convolution
    (LePE) is zero-padded at the borders of the stripe. A stripe as wide as the map is dense attention, which the last stage of
    the paper's models has. Time O(n sw (H + W) d), memory O(n d).

    Args:
        dim: width of the tokens.
        num_heads: heads.
        stripe: sw; 1, 2, 7, 7 in the paper's four stages.
        lepe: whether there is the convolution, with bias; masked tokens and cells beyond the map are zeros in it.
        lepe_kernel: its side, odd.
        **options: those of `AttentionMixer`; ``position`` must be one of queries and keys alone. Key and value heads are as many
            as the heads, or one, or an even number. The paper has ``qkv_bias``.

    Raises:
        ValueError: for a stripe below 1, an even kernel, a position of another kind, or heads that cannot be halved.
        UnsupportedError: for a grid that is not of rank 2, or with ``causal=True``.

    Differs from the paper: a map whose sides are no multiples of sw ends with narrower stripes. `mixing_matrix` is that of the
    attention, without the convolution.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        stripe: int = 7,
        lepe: bool = True,
        lepe_kernel: int = 3,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if stripe < 1:
            raise ValueError(f"stripe: expected at least 1, got {stripe}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}; lepe is an option here")
        if self.num_kv_heads not in (1, num_heads) and (self.num_kv_heads % 2 or num_heads % 2):
            raise ValueError(f"num_kv_heads: expected 1, num_heads, or an even number of either, got {self.num_kv_heads}")
        self.stripe = stripe
        self.heads = [count for count in ((num_heads + 1) // 2, num_heads // 2) if count]
        self.lepe: nn.ModuleList | None = None
        if lepe:
            parts = [LocallyEnhancedPosition(count, self.head_dim, kernel_size=lepe_kernel) for count in self.heads]
            self.lepe = nn.ModuleList(parts).to(device=options.get("device"), dtype=options.get("dtype"))

    def stripes(self, grid: Grid) -> list[Grid]:
        """Sides of the stripes of each half of the heads."""
        sides: list[Grid] = [(grid[0], min(self.stripe, grid[1])), (min(self.stripe, grid[0]), grid[1])]
        return sides[: len(self.heads)]

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax inside the stripes of each half."""
        grid = grid or (1, q.shape[2])
        found = []
        parts = zip(q.split(self.heads, dim=1), self._halves(k), self._halves(v), self.stripes(grid), strict=True)
        for part_q, part_k, part_v, sides in parts:
            cells = boxes(grid, sides).to(q.device)
            tiles = tile_attention(part_q, part_k, part_v, cells[None, None], cells[None, None], key_mask=masks.key)
            found.append(from_tiles(tiles.output, places_of(cells, q.shape[2])))
        return torch.cat(found, dim=1)

    def _halves(self, x: Float[Tensor, "b hk m d"]) -> Iterator[Float[Tensor, "b g m d"]]:
        """The key or value heads of each half of the query heads."""
        if self.num_kv_heads == 1:
            return iter([x] * len(self.heads))
        if self.num_kv_heads == self.num_heads:
            return iter(x.split(self.heads, dim=1))
        return iter(x.chunk(2, dim=1))

    def _with_local(
        self,
        heads: Float[Tensor, "b h n e"],
        v: Float[Tensor, "b hk m e"],
        grid: Grid | None,
        mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b h n e"]:
        """The head outputs and the convolved values of their stripes."""
        if self.lepe is None or grid is None:
            return heads
        found = []
        values = v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1).split(self.heads, dim=1)
        for part, module, sides in zip(values, self.lepe, self.stripes(grid), strict=True):
            lepe = cast("LocallyEnhancedPosition", module)
            windows = Windows(grid, sides)
            cells = windows.split(zero_masked(rearrange(part, "b h n e -> b n (h e)"), mask))
            inside = rearrange(cells, "b w s (h e) -> (b w) h s e", h=part.shape[1])
            local = rearrange(lepe.local(inside, sides, None), "(b w) h s e -> b w s (h e)", b=v.shape[0])
            found.append(rearrange(windows.merge(local), "b n (h e) -> b h n e", h=part.shape[1]))
        return heads + torch.cat(found, dim=1)
