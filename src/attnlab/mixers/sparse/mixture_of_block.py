"""Mixture of block attention: queries choose blocks of keys by their means, on sequences and on videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.tilings import boxes
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.sparse.block_choice import SCOPES, choose_blocks
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import full_precision
from attnlab.ops.tile_attention import places_of
from attnlab.ops.tile_attention.routed import routed_attention

Block = int | tuple[int, ...]


@mixers.register(
    "mixture_of_block",
    family="sparse",
    paper="vmoba",
    supports=Supports(causal="optional", grid=frozenset({1, 2, 3}), mixing_matrix=True, discontinuous=True, cost=2.0),
    example={"block": 3, "top_k": 2},
)
class MixtureOfBlockAttention(AttentionMixer):
    r"""Attention to one's own block of keys and to those whose mean fits (MoBA; Wu et al. 2025, VMoBA).

    $$G_{ic} = q_i^\top \bar k_c, \qquad
      o_i = \sum_{c \in C(i)} \sum_{j \in c} \mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j)\, v_j$$

    $\bar k_c$ is the mean of the real keys of block c. C(i) has the block of i and, by `choose_blocks`, the best k of a query
    (MoBA) or the fewest pairs of a ``scope`` that hold a share $\tau$ of its similarity (VMoBA). No gradient passes the choice.
    Blocks are runs of cells along the first axis, or tiles of the last ones over all of the others; VMoBA changes between frames,
    tiles over all frames and cubes from layer to layer (`block_of_layer`). With all blocks this is dense attention. Time
    O(n^2 d / y + p y d) for blocks of y keys and p chosen pairs of query and block; memory O(n^2 / y + p d).

    Where causal, a block behind the query's is never chosen, the query's own is cut at the query, and its score is of the mean of
    the keys up to there.

    ``record`` collects "selection" (b, h, n, blocks).

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        block: cells along the first axis, such as frames; or sides along the last axes: (h, w), (t, h, w).
        top_k: blocks of a query, its own included; None to choose by ``threshold``.
        threshold: $\tau$.
        scope: what competes, "query", "head" (VMoBA's global selection), "example" (all heads) or "block"; by default "head",
            and "query" where causal.
        **options: those of `AttentionMixer`; ``position`` must be one of queries and keys alone.

    Raises:
        ValueError: for sizes below 1, a scope that is unknown or does not fit ``top_k``, or a position of another kind.
        UnsupportedError: with ``causal=True`` for tiles, which are no runs of tokens, and for scopes in which later queries
            compete; for a grid with fewer axes than a tile.

    Differs from the papers: an example's choice does not depend on others in its batch; where no pair beside the own blocks is
    chosen these alone are attended to, while the released code then attends to everything.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        block: int | Sequence[int] = 64,
        top_k: int | None = None,
        threshold: float | int = 0.25,
        scope: str | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        self.block: Block = block if isinstance(block, int) else tuple(block)
        super().__init__(dim, num_heads, **options)
        sides = (block,) if isinstance(block, int) else self.block
        if not isinstance(sides, tuple) or not 1 <= len(sides) <= 3 or any(side < 1 for side in sides):
            raise ValueError(f"block: expected 1 to 3 sides of at least 1, got {block!r}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        if threshold < 0:
            raise ValueError(f"threshold: expected 0 or more, got {threshold}")
        scope = ("query" if self.causal else "head") if scope is None else scope
        if scope not in SCOPES or (scope == "block" and top_k is not None):
            raise ValueError(f"scope: expected one of {SCOPES}, 'block' for a threshold alone, got {scope!r}")
        if self.causal and scope != "query":
            raise self._refusal(f"causal=True with scope={scope!r}", "queries would compete with later ones")
        if self.causal and not isinstance(self.block, int):
            raise self._refusal(f"causal=True with block={self.block}", "a tile's cells do not follow one another")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}")
        self.top_k, self.threshold, self.scope = top_k, float(threshold), scope

    @property
    def supports(self) -> Supports:
        """Tiles need as many axes as they have."""
        found = self.info.supports
        return found if isinstance(self.block, int) else replace(found, grid=frozenset(range(len(self.block), 4)))

    def cells(self, grid: Grid) -> Int[Tensor, "c y"]:
        """The cells of each block, -1 for none."""
        block = (self.block, *grid[1:]) if isinstance(self.block, int) else (*grid[: len(grid) - len(self.block)], *self.block)
        return boxes(grid, [min(side, size) for side, size in zip(block, grid, strict=True)])

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the keys of the chosen blocks."""
        cells = self.cells(grid or (q.shape[2],)).to(q.device)
        block_of = torch.div(places_of(cells, q.shape[2]), cells.shape[1], rounding_mode="floor")
        chosen = self.choose(q, k, masks.key, cells, block_of)
        self.emit("selection", chosen)
        return routed_attention(q, k, v, chosen, cells, causal=self.causal, key_mask=masks.key).output

    @torch.no_grad()
    @full_precision
    def choose(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk n d"],
        mask: Bool[Tensor, "b n"] | None,
        cells: Int[Tensor, "c y"],
        block_of: Int[Tensor, "n"],
    ) -> Bool[Tensor, "b h n c"]:
        """The blocks of each query."""
        wide, group = accumulate_dtype(q.dtype), q.shape[1] // k.shape[1]
        q, k = q.to(wide), k.to(wide)
        real = torch.ones(len(q), q.shape[2], dtype=torch.bool, device=q.device) if mask is None else mask
        k = k.masked_fill(~real[:, None, :, None], 0.0)
        number = q.new_zeros(len(q), len(cells)).index_add(1, block_of, real.to(wide))
        total = k.new_zeros(*k.shape[:2], len(cells), k.shape[3]).index_add(2, block_of, k)
        means = (total / number.clamp(min=1)[:, None, :, None]).repeat_interleave(group, dim=1)
        scores = q @ means.mT
        place = torch.arange(len(cells), device=q.device)
        own = place == block_of[:, None]
        usable = (number > 0)[:, None, None] & real[:, None, :, None]
        if self.causal:
            usable = usable & (place <= block_of[:, None])
            so_far = self._so_far(q, k, real, cells.shape[1])
            scores = torch.where(own, so_far.unsqueeze(-1), scores)
        own, usable = own.expand_as(scores), usable.expand_as(scores)
        return choose_blocks(scores, own, usable, scope=self.scope, top_k=self.top_k, threshold=self.threshold)

    @staticmethod
    def _so_far(
        q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"], real: Bool[Tensor, "b n"], size: int
    ) -> Float[Tensor, "b h n"]:
        """Each query's product with the mean of the keys of its run up to itself."""
        length = q.shape[2]
        more = -length % size
        total = F.pad(k, (0, 0, 0, more)).unflatten(2, (-1, size)).cumsum(3).flatten(2, 3)[:, :, :length]
        number = F.pad(real, (0, more)).unflatten(1, (-1, size)).cumsum(2).flatten(1)[:, :length]
        means = total / number.clamp(min=1).to(k.dtype)[:, None, :, None]
        return (q.unflatten(1, (k.shape[1], -1)) * means.unsqueeze(2)).sum(-1).flatten(1, 2)


def block_of_layer(blocks: Sequence[int | Sequence[int]], layer: int) -> int | Sequence[int]:
    """The ``block`` of layer 0, 1, ... where layers take turns: VMoBA's frames, tiles over all frames, cubes.

    Raises:
        ValueError: without blocks, or for a negative layer.
    """
    if not blocks or layer < 0:
        raise ValueError(f"blocks, layer: expected some blocks and a layer of 0 or more, got {list(blocks)} and {layer}")
    return blocks[layer % len(blocks)]
