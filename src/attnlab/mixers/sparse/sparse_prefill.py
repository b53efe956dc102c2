"""Sparse prefill: blocks, or columns and diagonals, are chosen for a whole text, then attended to exactly."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.first_real import from_first_real
from attnlab.mixers.parts.selection import as_mask, block_means, sequence_blocks, tokens_of_blocks, top_k
from attnlab.mixers.sparse.frontier_rules import line_scores, ranked_blocks, ranked_lines
from attnlab.ops.attention import attention_map
from attnlab.ops.diagonal_attention import diagonal_attention
from attnlab.ops.partials import Partial, merge
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention

RULES = ("block", "vertical_slash", "flex_prefill")
ROWS = 64
"""Queries of a tile, where these are chosen by no rule."""


@mixers.register(
    "sparse_prefill",
    family="sparse",
    paper="sparse-frontier",
    partial=True,
    supports=Supports(mixing_matrix=True, discontinuous=True, cost=2.0),
    example={"block": 2, "num_blocks": 4, "num_lines": 3, "num_last": 3, "num_sinks": 1, "num_near": 2},
)
class SparsePrefillAttention(AttentionMixer):
    r"""Exact attention to keys that a rule chose for the whole text (Nawrot et al. 2025, arXiv 2504.17768).

    $$o_i = \sum_{j \in N(i)} \mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j)\, v_j$$

    - "block" (block-sparse MInference): blocks of b tokens; a block of queries keeps the k key blocks with the largest
      $\bar q^\top \bar k$ of means, the first, the own and the one before it among them. O(n k b d + n^2 d / b^2).
    - "vertical_slash": the last a queries' attention, summed over each column (a key) and each diagonal (a distance); the L
      largest of both, among them the first columns and the nearest diagonals. O(n (L + a) d).
    - "flex_prefill" (FlexPrefill without its blocks): as many of these as hold a share $\alpha$ of the attention, at least
      ``min_lines``, at most L, each head its own number.

    ``hide_later`` is the published form: j <= i throughout. **Its mask is causal and its choice is not**: means hold later
    queries of the block, and the last queries choose for all. So it is an option of the form that is not causal, and there is no
    ``causal=True``; of its relatives "quest" is causal. Otherwise later keys take part like earlier ones, the block behind and
    the nearest diagonals behind too.

    ``record`` collects "selection": of "block" (b, h, t, k), the blocks of each block; else the columns (b, h, L), and
    "diagonals", numbered from the one furthest behind, from 0 where hide_later; -1 for none.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        rule: see above.
        block: b.
        num_blocks: k.
        num_lines: L, of columns and of diagonals.
        min_lines: of "flex_prefill".
        num_last: a, the queries that choose.
        num_sinks: columns that are always kept.
        num_near: diagonals that are always kept.
        mass: $\alpha$.
        hide_later: whether a query uses no later key.
        **options: those of `AttentionMixer`; ``position`` may be "none" or "rotary".

    Raises:
        ValueError: for an unknown rule, sizes below 1, a mass outside of 0 to 1, or a position that is a bias.
        UnsupportedError: with ``causal=True``.

    Differs from the paper: diagonals are single ones, which its kernels widen to blocks.
    """

    rule: str = "block"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        rule: str = "block",
        block: int = 16,
        num_blocks: int = 16,
        num_lines: int = 256,
        min_lines: int = 1,
        num_last: int = 256,
        num_sinks: int = 4,
        num_near: int = 64,
        mass: float | int = 0.65,
        hide_later: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if rule not in RULES:
            raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")
        sizes = {"block": block, "num_blocks": num_blocks, "num_lines": num_lines, "min_lines": min_lines, "num_last": num_last}
        for name, value in (sizes | {"num_sinks": num_sinks, "num_near": num_near}).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 <= mass <= 1:
            raise ValueError(f"mass: expected 0 to 1, got {mass}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}; the choice knows no bias")
        self.rule, self.block, self.num_blocks, self.num_lines, self.min_lines = rule, block, num_blocks, num_lines, min_lines
        self.hide_later = hide_later
        self.num_last, self.num_sinks, self.num_near, self.mass = num_last, num_sinks, num_near, float(mass)

    @property
    def supports(self) -> Supports:
        """A fixed number of lines is linear."""
        found = self.info.supports
        return found if self.rule == "block" else replace(found, cost=1.0)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Choose, then softmax over the chosen; blocks and lines are counted from the first real token."""
        run = self._blocks if self.rule == "block" else self._lines
        return run(q, k, v, None) if masks.key is None else from_first_real(run, q, k, v, masks.key)

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        n = q.shape[2]
        of_q, _ = block_means(q, self.block, real)
        of_k, some = block_means(k, self.block, real)
        of_k = of_k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        chosen = ranked_blocks(of_q, of_k, self.num_blocks, some, later=not self.hide_later)
        self.emit("selection", chosen)
        queries = sequence_blocks(n, self.block).to(q.device)
        keys = tokens_of_blocks(chosen, self.block, n)
        found = tile_attention(q, k, v, queries[None, None], keys, causal=self.hide_later, key_mask=real)
        return from_tiles(found.output, places_of(queries, n))

    def _lines(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        n = q.shape[2]
        columns, diagonals = self._choose(q.detach(), k.detach(), real)
        self.emit("selection", columns)
        self.emit("diagonals", diagonals)
        rows = sequence_blocks(n, min(ROWS, n)).to(q.device)
        keys = columns.unsqueeze(2).expand(-1, -1, len(rows), -1)
        found = tile_attention(q, k, v, rows[None, None], keys, causal=self.hide_later, key_mask=real)
        whole = found._replace(output=found.output.flatten(2, 3)[:, :, :n], lse=found.lse.flatten(2, 3)[:, :, :n])
        # a key on a diagonal counts once, with its column where that is chosen
        left = ~as_mask(columns, n)
        if real is not None:
            left = left & real.unsqueeze(1)
        distances = torch.where(diagonals < 0, 2 * n, diagonals + self._first(n))
        return merge(whole, along_diagonals(q, k, v, distances, left)).output

    def _choose(self, q: Tensor, k: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Columns and diagonals of each head, -1 for none."""
        b, n = q.shape[0], q.shape[2]
        place = torch.arange(n, device=q.device)
        known = place.expand(b, -1) >= 0 if real is None else real
        last = top_k(place.to(q.dtype).expand(b, -1), min(self.num_last, n), known)
        index = last.clamp(min=0)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        furthest = last if self.hide_later else last.masked_fill(last >= 0, n)
        pairs = (place <= furthest.unsqueeze(-1)) & known.unsqueeze(1)
        weights = attention_map(q.gather(2, index), k, pair_mask=pairs[:, None])
        columns, diagonals = line_scores(weights, last, first=self._first(n))
        count, mass = min(self.num_lines, n), self.mass if self.rule == "flex_prefill" else None
        distance = torch.arange(self._first(n), n, device=q.device).abs()
        sinks, near = (place < self.num_sinks) & known, (distance < self.num_near)[None]
        return (
            ranked_lines(columns, sinks, count, mass=mass, least=self.min_lines),
            ranked_lines(diagonals, near, min(self.num_lines, n - self._first(n)), mass=mass, least=self.min_lines),
        )

    def _first(self, n: int) -> int:
        """The first diagonal: keys up to n - 1 places behind their query, or none."""
        return 0 if self.hide_later else 1 - n


def along_diagonals(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n e"],
    distances: Int[Tensor, "b h r"],
    allowed: Bool[Tensor, "b h n"],
) -> Partial:
    """`diagonal_attention` on a CPU; elsewhere, where its many small steps are slow, the keys of each query as a tile."""
    if q.is_cpu:
        return diagonal_attention(q, k, v, distances, allowed=allowed)
    n = q.shape[2]
    place = torch.arange(n, device=q.device)
    keys = place[:, None] - distances.unsqueeze(2)
    gone = (keys < 0) | (keys >= n)
    keys = keys.clamp(0, n - 1)
    gone = gone | ~allowed.unsqueeze(2).expand(-1, -1, n, -1).gather(-1, keys)
    found = tile_attention(q, k, v, place[None, None, :, None], keys.masked_fill(gone, -1))
    return Partial(found.output.squeeze(3), found.lse.squeeze(3))
