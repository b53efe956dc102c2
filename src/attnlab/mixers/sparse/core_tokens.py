"""Groups of tokens pooled to core tokens, and attention to cores far away together with exact tokens nearby."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.core.tilings import segments_of
from attnlab.ops.partials import Partial, merge
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention
from attnlab.positions.base import Position

ROWS = 64
"""Queries of a tile, about."""


class Cores(NamedTuple):
    """One token a group and head: keys (b, h, t, d), values (b, h, t, e), and whether the group has a real token."""

    k: Float[Tensor, "b h t d"]
    v: Float[Tensor, "b h t e"]
    real: Bool[Tensor, "b t"]


class Exact(NamedTuple):
    """Keys and values of single tokens, of which the first stands at place ``base`` of the sequence."""

    k: Float[Tensor, "b hk m d"]
    v: Float[Tensor, "b hk m e"]
    real: Bool[Tensor, "b m"] | None
    base: int


@dataclass(frozen=True)
class Reach:
    """Which cores and which tokens a query uses.

    Args:
        group: g, tokens of a group.
        window: s, tokens before which all groups are pooled.
        overlap: whether the last token of the last pooled group is used exactly too.
    """

    group: int
    window: int
    overlap: bool

    def cores(self, place: int) -> int:
        """j, how many of the first groups the query at this place sees pooled."""
        return max(0, (place + 1 - self.window) // self.group)

    def first_exact(self, place: int) -> int:
        """The first token that the query at this place sees exactly."""
        return max(0, self.cores(place) * self.group - self.overlap)

    def pool(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk n d"],
        v: Float[Tensor, "b hk n e"],
        real: Bool[Tensor, "b n"] | None,
        turn: Position | None,
    ) -> Cores:
        """The cores of all complete groups, of which the first begins with the first token.

        Args:
            q: queries; a group's last real one weighs the group.
            k: keys, with their positions in them.
            v: values.
            real: which tokens take part.
            turn: brings a key to the position of its group's last real token before it is pooled; None leaves it at its own.
        """
        groups = q.shape[2] // self.group
        end = groups * self.group
        q, k, v = q[:, :, :end], k[:, :, :end], v[:, :, :end]
        places = torch.arange(end, device=q.device).view(1, groups, self.group)
        inside = places >= 0 if real is None else real[:, :end].unflatten(1, (groups, self.group))
        last = places.masked_fill(~inside, -1).amax(-1, keepdim=True)
        keys = k if turn is None else turn.encode(k, (last - places).clamp(min=0).flatten(1))
        found = tile_attention(
            q,
            k,
            torch.cat((keys, v), dim=-1),
            last.unsqueeze(1),
            places.unsqueeze(1),
            key_mask=None if real is None else real[:, :end],
        )
        core_k, core_v = found.output.squeeze(3).split((k.shape[-1], v.shape[-1]), dim=-1)
        return Cores(core_k, core_v, inside.any(-1).expand(q.shape[0], -1))

    def attend(self, q: Float[Tensor, "b h n d"], exact: Exact, cores: Cores) -> Float[Tensor, "b h n e"]:
        """One softmax over cores and exact tokens; the last query stands at the last exact token."""
        first = exact.base + exact.k.shape[2] - q.shape[2]
        near = self._near(q, exact, first)
        if self.cores(first + q.shape[2] - 1) == 0:
            return near.output
        return merge(near, self._far(q, cores, first)).output

    def _near(self, q: Tensor, exact: Exact, first: int) -> Partial:
        """Attention to exact tokens: runs of queries, each with the keys that any of them uses."""
        n, device = q.shape[2], q.device
        if n == 1:
            start = self.first_exact(first) - exact.base
            keys = torch.arange(start, exact.k.shape[2], device=device)[None, None, None]
            found = tile_attention(q, exact.k, exact.v, keys.new_zeros(1, 1, 1, 1), keys, key_mask=exact.real)
            return Partial(found.output.squeeze(3), found.lse.squeeze(3))
        size, more = self.group * max(1, ROWS // self.group), int(self.overlap)
        shift = self.window - 1
        tiles = torch.arange((first - shift) // size, (first + n - 1 - shift) // size + 1, device=device)[:, None] * size
        a = torch.arange(size, device=device)
        b = torch.arange(shift + size + more, device=device)
        queries = tiles + shift + a - first
        queries = queries.masked_fill((queries < 0) | (queries >= n), -1)
        keys = tiles - more + b
        keys = (keys - exact.base).masked_fill((keys < exact.base) | (keys >= first + n), -1)
        used = (b >= (a // self.group * self.group)[:, None]) & (b <= (a + shift + more)[:, None])
        bias = q.new_zeros(used.shape).masked_fill(~used, float("-inf"))[None, None]
        found = tile_attention(q, exact.k, exact.v, queries[None, None], keys[None, None], bias=bias, key_mask=exact.real)
        return in_order(found, queries, n)

    def _far(self, q: Tensor, cores: Cores, first: int) -> Partial:
        """Attention to cores. Queries with the same cores become heads of one row, so that row r uses cores up to r."""
        n, g = q.shape[2], self.group
        low, high = self.cores(first), self.cores(first + n - 1)
        start = low * g + self.window - 1 - first  # of the first row, among the queries given
        before, skipped = max(0, -start), max(0, start)
        rows = high - low + 1
        folded = F.pad(q[:, :, skipped:], (0, 0, before, rows * g - before - (n - skipped)))
        folded = folded.unflatten(2, (rows, g)).transpose(2, 3).flatten(1, 2)
        whole = self._rows(folded, cores, 0, low, causal=False)
        later = self._rows(folded[:, :, 1:], cores, low, high, causal=True)
        later = Partial(F.pad(later.output, (0, 0, 1, 0)), F.pad(later.lse, (1, 0), value=float("-inf")))
        found = merge(whole, later)
        output = found.output.unflatten(1, (-1, g)).transpose(2, 3).flatten(2, 3)[:, :, before : before + n - skipped]
        lse = found.lse.unflatten(1, (-1, g)).transpose(2, 3).flatten(2, 3)[:, :, before : before + n - skipped]
        return Partial(F.pad(output, (0, 0, skipped, 0)), F.pad(lse, (skipped, 0), value=float("-inf")))

    @staticmethod
    def _rows(q: Tensor, cores: Cores, start: int, end: int, *, causal: bool) -> Partial:
        """Attention of all rows to the cores from ``start`` to ``end``, to as many as the row's number where causal."""
        k, v, real = cores.k[:, :, start:end], cores.v[:, :, start:end], cores.real[:, start:end]
        queries = segments_of(q.shape[2], min(ROWS, max(1, q.shape[2]))).to(q.device)
        keys = torch.arange(end - start, device=q.device).expand(1, 1, len(queries), -1)
        if 0 in (q.shape[2], end - start):
            return Partial(q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full(q.shape[:3], float("-inf")))
        found = tile_attention(q, k, v, queries[None, None], keys, causal=causal, key_mask=real)
        return in_order(found, queries, q.shape[2])


def in_order(found: Partial, queries: Int[Tensor, "t x"], n: int) -> Partial:
    """What tiles hold for each of n tokens, each of which stands in one of them."""
    inverse = places_of(queries, n)
    return Partial(from_tiles(found.output, inverse), found.lse.flatten(2, 3).index_select(2, inverse))
