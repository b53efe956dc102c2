r"""Which keys an estimated attention keeps: the best columns of a compressed map, and the keys that each stands for.

Of a row over ``len`` keys the compressed map has K columns; key j reads column $\lceil (j + 1/2) K / len \rceil - 1$, nearest
resizing with ties to the left. Keys are counted among the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SCOPES = ("query", "causal_batch", "head", "batch")


@dataclass(frozen=True)
class Budget:
    r"""How many columns are kept: k keys a query and head on average, shared over a scope.

    A row over len keys deserves $k K / len$ columns. What the scope's rows deserve is added up, rounded, and at least 1: "query"
    is each row of each head by itself, "causal_batch" a query with its heads, "head" all queries of a head, "batch" both.

    Args:
        kept: k.
        columns: K.
        scope: one of `SCOPES`.

    Raises:
        ValueError: for a number below 1 or an unknown scope.
    """

    kept: int
    columns: int
    scope: str

    def __post_init__(self) -> None:
        for name, size in (("num_kept", self.kept), ("estimate_dim", self.columns)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope: expected one of {SCOPES}, got {self.scope!r}")

    @property
    def across_queries(self) -> bool:
        """Whether queries compete with each other."""
        return self.scope in ("head", "batch")

    def of(self, lengths: Int[Tensor, "*s"], heads: int) -> Int[Tensor, "*s"]:
        """Columns a row, or a row of all heads, may keep; not for scopes over queries."""
        share = heads if self.scope == "causal_batch" else 1
        return (share * self.kept * self.columns / lengths.double()).round().clamp(min=1).long()

    def choose(
        self, p: Float[Tensor, "b h n c"], lengths: Int[Tensor, "#b #n"], real: Bool[Tensor, "b n"] | None
    ) -> Bool[Tensor, "b h n c"]:
        """True at the columns that are kept; of equal ones the first. Rows that are not real keep none."""
        b, h, n, c = p.shape
        p = p.detach()
        if real is not None:
            p = p.masked_fill(~real[:, None, :, None], -1.0)
        if self.scope == "query":
            pool, budget = p, self.of(lengths, h)[:, None, :, None]
        elif self.scope == "causal_batch":
            pool, budget = p.transpose(1, 2).flatten(2), self.of(lengths, h)[..., None]
        else:
            pool = p.flatten(2) if self.scope == "head" else p.flatten(1)
            shared = self.kept * self.columns * (h if self.scope == "batch" else 1)
            budget = torch.full((1,) * pool.dim(), shared, device=p.device)
        order = pool.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(pool.shape[-1], device=p.device).expand_as(order))
        chosen = rank < budget
        chosen = chosen.view(b, n, h, c).transpose(1, 2) if self.scope == "causal_batch" else chosen.view(b, h, n, c)
        return chosen if real is None else chosen & real[:, None, :, None]

    def most_keys(self, num_keys: int, heads: int) -> int:
        """The most keys that a query of a head can keep where there are up to ``num_keys``."""
        if self.across_queries:
            return num_keys
        share = self.kept * self.columns * (heads if self.scope == "causal_batch" else 1)
        best = 0
        for columns in range(1, self.columns + 1):
            # the longest row that is given so many: share / length rounds to them
            length = num_keys if columns == 1 else min(num_keys, 2 * share // (2 * columns - 1))
            best = max(best, min(length, columns * -(-length // self.columns)))
        return best


def column_of(rank: Int[Tensor, "*s"], lengths: Int[Tensor, "*s2"], columns: int) -> Int[Tensor, "*s3"]:
    """The column that the key of this rank reads, of ``lengths`` keys."""
    return (((2 * rank + 1) * columns - 1) // (2 * lengths)).clamp(max=columns - 1)


def first_keys(lengths: Int[Tensor, "*s"], columns: int) -> Int[Tensor, "*s c1"]:
    """The rank of the first key of every column, and at last the number of keys: the inverse of `column_of`."""
    edge = 2 * lengths[..., None] * torch.arange(columns + 1, device=lengths.device) + 1 - columns
    return (-(-edge // (2 * columns))).clamp(min=0)


def kept_keys(
    chosen: Bool[Tensor, "b h n c"], lengths: Int[Tensor, "#b #n"], most: int
) -> tuple[Int[Tensor, "b h n m"], Bool[Tensor, "b h n m"]]:
    """The ranks of the keys of the chosen columns, in order and at most ``most``, and which of these places are taken."""
    first = first_keys(lengths, chosen.shape[-1])[:, None]
    sizes = chosen * first.diff(dim=-1)
    ends = sizes.cumsum(-1)
    place = torch.arange(most, device=chosen.device).expand(*chosen.shape[:3], most)
    column = torch.searchsorted(ends, place.contiguous(), right=True).clamp(max=chosen.shape[-1] - 1)
    begins = first[..., :-1].expand_as(ends) - (ends - sizes)
    return begins.gather(-1, column) + place, place < ends[..., -1:]


def kept_pairs(chosen: Bool[Tensor, "b h n c"], lengths: Int[Tensor, "#b #n"], num_keys: int) -> Bool[Tensor, "b h n m"]:
    """The same as a map over all keys by rank."""
    rank = torch.arange(num_keys, device=chosen.device)
    lengths = lengths[:, None, :, None]
    column = column_of(rank, lengths, chosen.shape[-1]).expand(*chosen.shape[:3], -1)
    return chosen.gather(-1, column) & (rank < lengths)
