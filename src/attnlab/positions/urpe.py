"""Universal relative position: weights by offset that multiply the attention map after its normaliser."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.ops.attention import Pairwise
from attnlab.positions.base import Position, offsets_between, positions
from attnlab.positions.bucketed import log_buckets


@positions.register("urpe", family="bias", paper="urpe")
class UniversalRelativePosition(Position):
    r"""Attention whose normalised map is multiplied by a learned Toeplitz matrix (Luo et al. 2022, equation 7).

    $$o_i = \sum_j \mathrm{softmax}_j(s\, q_i^\top k_j + b_{\mathrm{bucket}(j-i)})\; c_{\mathrm{bucket}(j-i)}\; v_j$$

    With a bias alone the rows sum to one, so that identical tokens give identical outputs wherever they stand; the factor, not
    normalised again, lets the attention tell positions apart. It is 1 at first and may become negative. Memory O(n + m).

    Args:
        num_heads: heads, each with its own b and c.
        head_dim: width of a query; not used.
        buckets: "unique", an entry for each offset, or "log", signed log-spaced buckets.
        num_buckets: twice the buckets of a sign, for "log"; half of those hold one distance each.
        max_distance: offsets beyond it share the last entry.
        bias: whether there is the additive b beside c.

    Raises:
        ValueError: for an unknown kind of buckets, fewer than 8 of them, or a distance that is too short for them.

    Differs from the paper: the table of log buckets has no unused rows, and is the same at every length, where the authors' code
    counts from the least bucket that occurs; tables are the mixer's own and not shared by layers.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        buckets: str = "unique",
        num_buckets: int = 32,
        max_distance: int = 128,
        bias: bool = True,
    ) -> None:
        super().__init__(num_heads, head_dim)
        if buckets not in ("unique", "log"):
            raise ValueError(f"buckets: expected 'unique' or 'log', got {buckets!r}")
        if num_buckets < 8 or num_buckets % 4:
            raise ValueError(f"num_buckets: expected a multiple of 4 from 8 on, got {num_buckets}")
        least = 1 if buckets == "unique" else num_buckets // 4 + 1
        if max_distance < least:
            raise ValueError(f"max_distance: expected at least {least} with buckets={buckets!r}, got {max_distance}")
        self.buckets, self.num_buckets, self.max_distance = buckets, num_buckets, max_distance
        self.reach = max_distance if buckets == "unique" else num_buckets // 2 - 1
        self.weight = nn.Parameter(torch.ones(num_heads, 2 * self.reach + 1))
        self.shift = nn.Parameter(torch.zeros(num_heads, 2 * self.reach + 1)) if bias else None

    def rows(self, offsets: Int[Tensor, "r"]) -> Int[Tensor, "r"]:
        """The row of the tables for each offset, key minus query; the middle one is that of offset 0."""
        if self.buckets == "log":
            sizes = log_buckets(-offsets.abs(), self.num_buckets // 2, self.max_distance, causal=True)
            offsets = offsets.sign() * sizes
        return offsets.clamp(-self.reach, self.reach) + self.reach

    def _by_offset(self, table: Tensor, q: Tensor, num_keys: int) -> Pairwise:
        rows = self.rows(offsets_between(q.shape[2], num_keys, q.device))
        return Pairwise(offsets=table.to(q.dtype)[:, rows])

    def bias(self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None) -> Pairwise | None:
        """b by offset."""
        return None if self.shift is None else self._by_offset(self.shift, q, num_keys)

    def factor(self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None) -> Pairwise:
        """c by offset."""
        return self._by_offset(self.weight, q, num_keys)
