"""Strided, fixed and dilated sparse attention: static patterns of keys along a sequence."""

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
from attnlab.core.tilings import interleaved, segments_of
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.span_summaries import Sources, merged, read
from attnlab.ops.partials import Partial

PATTERNS = ("strided", "fixed", "dilated")
TILE = 32
"""Queries of a tile of a band, at least."""


@mixers.register(
    "strided_sparse",
    family="sparse",
    supports=Supports(causal="optional", mixing_matrix=True, cost=2.0),
    example={"stride": 3},
)
class StridedSparseAttention(AttentionMixer):
    r"""Softmax attention over a static pattern of keys (Child et al. 2019, arXiv 1904.10509; dilated: Beltagy et al. 2020).

    $$o_i = \sum_{j \in N(i)} \mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j)\, v_j$$

    with stride l, and causal only j <= i:

    - "strided": $|i - j| < l$ or $i - j$ a multiple of l. O(n (l + n / l)).
    - "fixed": j in the block of i, $\lfloor j / l \rfloor = \lfloor i / l \rfloor$, or one of the last c of its own block,
      $j \bmod l \ge l - c$. O(n (l + n c / l)).
    - "dilated": the w nearest multiples of l before i, itself among them; where not causal, w / 2 on each side. O(n w).

    The union of a pattern's two parts is in one softmax, the paper's "merged head". Memory O(n d + n^2 / l^2).

    Args:
        dim: width of the tokens.
        num_heads: heads.
        pattern: see above.
        stride: l, about $\sqrt{n}$ in the paper.
        num_summary: c of "fixed", at most l; the paper has 8 to 32.
        window: w of "dilated".
        **options: those of `AttentionMixer`; ``position`` may be "none" or "rotary".

    Raises:
        ValueError: for an unknown pattern, sizes that do not fit, or a position that is a bias.

    Differs from the papers: all heads have the same pattern, of which several mixers in turn make the interleaved form. Places
    are counted with masked tokens: pad on the right.
    """

    pattern: str = "strided"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        pattern: str = "strided",
        stride: int = 64,
        num_summary: int = 1,
        window: int = 64,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if pattern not in PATTERNS:
            raise ValueError(f"pattern: expected one of {PATTERNS}, got {pattern!r}")
        for name, value in (("stride", stride), ("window", window)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 1 <= num_summary <= stride:
            raise ValueError(f"num_summary: expected 1 to stride = {stride}, got {num_summary}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}; the pattern has no bias")
        self.pattern, self.stride, self.num_summary, self.window = pattern, stride, num_summary, window

    @property
    def supports(self) -> Supports:
        """A band alone is linear."""
        found = self.info.supports
        return found if self.pattern != "dilated" else replace(found, cost=1.0)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the pattern."""
        real = q.new_ones(q.shape[0], q.shape[2], dtype=torch.bool) if masks.key is None else masks.key
        q, tokens = q * q.shape[-1] ** -0.5, Sources(k, v, real)
        parts = {"strided": self._strided, "fixed": self._fixed, "dilated": self._dilated}[self.pattern](q, tokens)
        return merged(*parts)

    def _strided(self, q: Tensor, tokens: Sources) -> list[Partial]:
        """A band, and the cells a multiple of the stride away without the own one."""
        near = self._band(q, tokens, torch.arange(q.shape[2])[None], self.stride - 1)
        column = interleaved(q.shape[2], self.stride)
        pairs = torch.ones(column.shape[1], column.shape[1], dtype=torch.bool, device=q.device)
        pairs = pairs.tril(-1) if self.causal else pairs ^ torch.eye(len(pairs), dtype=torch.bool, device=q.device)
        return [near, read(q, tokens, column, column, allowed=pairs)]

    def _fixed(self, q: Tensor, tokens: Sources) -> list[Partial]:
        """The own block, and the last cells of the others."""
        blocks = segments_of(q.shape[2], self.stride)
        last, number = blocks[:, self.stride - self.num_summary :].flatten(), torch.arange(len(blocks))
        owner = number.repeat_interleave(self.num_summary)
        gone = owner >= number[:, None] if self.causal else owner == number[:, None]
        keys = last.expand(len(blocks), -1).masked_fill(gone, -1)
        return [read(q, tokens, blocks, blocks, causal=self.causal), read(q, tokens, blocks, keys)]

    def _dilated(self, q: Tensor, tokens: Sources) -> list[Partial]:
        """A band among the cells a multiple of the stride apart."""
        reach = self.window - 1 if self.causal else self.window // 2
        return [self._band(q, tokens, interleaved(q.shape[2], self.stride), reach)]

    def _band(self, q: Tensor, tokens: Sources, lines: Int[Tensor, "t m"], reach: int) -> Partial:
        """Attention along each line of cells to as many before, and behind where not causal."""
        behind = 0 if self.causal else reach
        queries, keys, allowed = band(lines, reach, behind)
        return read(q, tokens, queries, keys, allowed=allowed.to(q.device))


def band(
    lines: Int[Tensor, "t m"], before: int, behind: int
) -> tuple[Int[Tensor, "s x"], Int[Tensor, "s y"], Bool[Tensor, "x y"]]:
    """Tiles of queries along each line, the keys within reach of any of them, and which pairs are.

    Args:
        lines: cells in order, -1 for none.
        before: how many cells before its own a query uses.
        behind: how many behind it.
    """
    m = lines.shape[1]
    before, behind = min(before, m - 1), min(behind, m - 1)
    size = min(m, max(TILE, before + behind))
    first = torch.arange(0, m, size)[:, None]
    a, b = torch.arange(size), torch.arange(size + before + behind)

    def cells(index: Tensor) -> Tensor:
        outside = (index < 0) | (index >= m)
        return lines[:, index.clamp(0, m - 1)].masked_fill(outside, -1).flatten(0, 1)

    offset = b - before - a[:, None]
    return cells(first + a), cells(first - before + b), (offset >= -before) & (offset <= behind)
