"""Blocks of queries that read the cells of their block and of a halo around it, with relative logits an axis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.core.tilings import boxes, product, segments_of
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.tiled_attention import BORDERS, zero_keys
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention


@mixers.register(
    "halo",
    family="local",
    paper="halonet",
    supports=Supports(grid=frozenset({1, 2, 3}), mixing_matrix=True, cost=1.0),
    example={"block": 3, "halo": 1},
)
class HaloAttention(AttentionMixer):
    r"""Blocked local attention with a halo (Vaswani et al. 2021, HaloNet, section 2.2).

    $$o_i = \sum_{j \in W(i)} \mathrm{softmax}_j\Big(d^{-1/2}\, q_i^\top k_j + \sum_a q_i^\top r^a_{w^a_j - b^a_i}\Big)\, v_j$$

    The grid is cut into blocks of b cells a side; W(i) is the block of i and h cells more on each side, w = b + 2 h a side.
    $b^a_i$ counts from the beginning of the block along axis a, $w^a_j$ from that of W, and
    $r^a \in \mathbb{R}^{(2w - 1) \times d}$ is learned, shared by the heads. Time O(n w^r (d + r w)) on a grid of rank r.

    The relative logits are products too, of the query's logit for each of the w places along an axis with a one-hot vector that
    says at which place, counted modulo w, a key stands: no key is copied for the blocks that share it, and there is no tensor of
    all pairs. Memory O(n (d + r w)), that is (d + r w) / d times the keys.

    Args:
        dim: width of the tokens.
        num_heads: heads; 16 wide in the paper.
        block: b, side of a block.
        halo: h, cells beyond the block on each side.
        relative_logits: whether there are r, truncated normal with deviation $d^{-1/2}$; the paper has them, with rank 2.
        rank: of the grid that these are for.
        scaled_logits: whether the relative logits are scaled by $d^{-1/2}$ too.
        border: what cells beyond the grid are: "zero_keys", keys and values of zeros with their relative logits, which take part
            in the softmax, and so are masked tokens then; or "masked".
        **options: those of `AttentionMixer`; ``position`` must be one of queries and keys alone.

    Raises:
        ValueError: for a block below 1, a negative halo, relative logits without a rank, an unknown border, or a position of
            another kind.
        UnsupportedError: for a grid of another rank than the relative logits are for, or with ``causal=True``.

    Differs from the paper: the authors published no code; border and scale are as in timm's reading. Values are as
    wide as keys, where larger HaloNets have wider ones, and there is an output projection. A grid whose sides are no multiples
    of b has smaller blocks at its end.
    """

    rank: int | None = None
    tables: nn.ParameterList | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        block: int = 8,
        halo: int = 3,
        relative_logits: bool = False,
        rank: int | None = None,
        scaled_logits: bool = False,
        border: str = "zero_keys",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if block < 1:
            raise ValueError(f"block: expected at least 1, got {block}")
        if halo < 0:
            raise ValueError(f"halo: expected 0 or more, got {halo}")
        if rank not in ((1, 2, 3) if relative_logits else (None, 1, 2, 3)):
            raise ValueError(f"rank: expected 1, 2 or 3, the rank of the grid that relative_logits are for, got {rank}")
        if border not in BORDERS:
            raise ValueError(f"border: expected one of {BORDERS}, got {border!r}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}; relative_logits are one here")
        self.block, self.halo, self.window = block, halo, block + 2 * halo
        self.rank, self.scaled_logits, self.border = rank, scaled_logits, border
        self.tables = None
        if relative_logits and rank is not None:
            shape = (2 * self.window - 1, self.head_dim)
            place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
            self.tables = nn.ParameterList([nn.Parameter(torch.empty(shape, **place)) for _ in range(rank)])
            for table in self.tables:
                nn.init.trunc_normal_(table, std=self.head_dim**-0.5)

    @property
    def supports(self) -> Supports:
        """With a rank, grids of that rank alone."""
        found = self.info.supports
        return found if self.rank is None else replace(found, grid=frozenset({self.rank}))

    def downsample(
        self,
        x: Float[Tensor, "b n c"],
        *,
        stride: int,
        mask: Bool[Tensor, "b n"] | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "b s c"]:
        """Attention of every ``stride``-th cell along each axis alone: tokens of the smaller grid (section 2.2).

        Offsets in the relative logits then count queries in steps of the stride, as in timm.

        Args:
            x: tokens, as for `forward`.
            stride: a divisor of the block.
            mask: as for `forward`; the output is 0 at queries that it masks.
            grid: as for `forward`.

        Raises:
            ValueError: for a stride that does not divide the block, and as `forward`.
        """
        if stride < 1 or self.block % stride:
            raise ValueError(f"stride: expected a divisor of block={self.block}, got {stride}")
        grid = self._validate(x, None, mask, None, None, grid)
        x = zero_masked(x, mask)
        q, k, v = self.project(x, None, self.place(x, mask))
        kept = product([torch.arange(0, n, stride)[None] for n in grid], grid)[0].to(x.device)
        some = None if mask is None else mask[:, kept]
        heads = self._attend(q[:, :, kept], k, v, Masks(some, mask), grid, stride)
        return zero_masked(self.join(heads, x[:, kept], some), some)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the block and its halo; masked tokens are what lies beyond the border."""
        return self._attend(q, k, v, masks, grid or (q.shape[2],), 1)

    def _attend(
        self,
        q: Float[Tensor, "b h s d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid,
        stride: int,
    ) -> Float[Tensor, "b h s e"]:
        """Of the queries in steps of ``stride``; keys are those of the grid with a halo of its own."""
        real = masks.key
        if self.border == "zero_keys":
            k, v = zero_keys(k, v, real)
            key_mask = None
        else:
            real = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if real is None else real
            key_mask = self._extended(real[:, None, :, None], grid)[:, 0, :, 0]
        k, v = self._extended(k, grid), self._extended(v, grid)
        asked = tuple(-(-n // stride) for n in grid)
        scaled = q * q.shape[-1] ** -0.5
        if self.tables is not None:
            logits = self._logits(scaled if self.scaled_logits else q, asked, self.block // stride)
            scaled, k = torch.cat((scaled, *logits), dim=-1), torch.cat((k, self._places(k, grid)), dim=-1)
        sides = self._sides(grid)
        queries = boxes(asked, (self.block // stride,) * len(grid)).to(q.device)
        axes = [segments_of(s, self.window, step=self.block)[: -(-n // self.block)] for s, n in zip(sides, grid, strict=True)]
        keys = product(axes, sides).to(q.device)
        found = tile_attention(scaled, k, v, queries[None, None], keys[None, None], key_mask=key_mask, scale=1.0)
        return from_tiles(found.output, places_of(queries, q.shape[2]))

    def _sides(self, grid: Grid) -> Grid:
        """The grid with whole blocks, and the halo at both ends."""
        return tuple(-(-n // self.block) * self.block + 2 * self.halo for n in grid)

    def _extended(self, x: Shaped[Tensor, "b h m e"], grid: Grid) -> Shaped[Tensor, "b h p e"]:
        """Zeros (False) beyond the grid."""
        extra = [side - n - self.halo for side, n in zip(self._sides(grid), grid, strict=True)]
        widths = [0, 0, *(width for after in reversed(extra) for width in (self.halo, after))]
        return F.pad(x.unflatten(2, grid), widths).flatten(2, -2)

    def _logits(self, q: Float[Tensor, "b h s d"], asked: Grid, step: int) -> list[Float[Tensor, "b h s w"]]:
        """For each axis the logit of every place modulo w, given that ``step`` queries are a block."""
        found = []
        for axis, (n, table) in enumerate(zip(asked, self.tables or (), strict=True)):
            at = torch.arange(n, device=q.device)[:, None]
            begin = at // step * self.block  # of the window, in the grid with its halo
            place = (torch.arange(self.window, device=q.device) - begin) % self.window
            vectors = table.to(q.dtype)[place - at % step + self.window - 1]
            along = q.unflatten(2, asked).movedim(2 + axis, 2)
            logits = torch.einsum("bhn...d,nwd->bhn...w", along, vectors)
            found.append(logits.movedim(2, 2 + axis).flatten(2, -2))
        return found

    def _places(self, k: Float[Tensor, "b hk p d"], grid: Grid) -> Float[Tensor, "b hk p rw"]:
        """Where each cell of the extended grid stands along each axis, modulo w."""
        axes = [torch.arange(side, device=k.device) % self.window for side in self._sides(grid)]
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
        return F.one_hot(cells, self.window).flatten(1).to(k.dtype).expand(*k.shape[:2], -1, -1)
