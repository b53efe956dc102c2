"""The tiles of all examples and heads in one row, and what a run of them reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.buffers import Buffers
from attnlab.ops.tile_attention.inputs import Inputs

LOG2E = 1 / math.log(2)
CHUNK = {"cpu": 2**20}
"""Scores of a run by device: few enough for a CPU's cache, many enough for its threads to meet seldom; 2**25 elsewhere."""


@dataclass(frozen=True)
class Run:
    """Some tiles: c of them, of x queries and y keys.

    Args:
        rows: which, among the tiles of all examples and heads: neighbours, or places where some tiles are left out.
        query_places: (c, x), -1 for none.
        key_places: (c, y), -1 for none.
        queries: (c x,), rows of the flat queries, 0 where there is none.
        keys: (c y,), rows of the flat keys, 0 where there is none.
        no_key: (c, y), -1 among the keys; None if there is none at all.
        kinds: (c,), rows of the flat bias.
        first_keys: (c, 1), where the example of each tile begins in the flat mask of keys.
    """

    rows: slice | Tensor
    query_places: Tensor
    key_places: Tensor
    queries: Tensor
    keys: Tensor
    no_key: Tensor | None
    kinds: Tensor | None
    first_keys: Tensor


class Work:
    """The arguments of a call, flat: tokens (b h n, d), tiles (b h t) in a row, in the dtype that sums run in.

    Scores are powers of 2: the queries are scaled by log2(e), so is the bias.
    """

    def __init__(self, inputs: Inputs) -> None:
        q, k, v, queries, keys, bias, kind, key_mask, causal, zero_outside, self.scale = inputs
        dtype = accumulate_dtype(q.dtype)
        if key_mask is not None:
            # What stands at a masked key must not matter, and 0 * nan is not 0.
            k, v = (t.masked_fill(~key_mask[:, None, :, None], 0) for t in (k, v))
        self.q, self.k, self.v = (t.to(dtype).flatten(0, 2) for t in (q, k, v))
        self.buffers = Buffers(self.q)
        self.causal, self.zero_outside = causal, zero_outside
        self.batch, self.heads, self.length = q.shape[:3]
        self.kv_heads, self.num_keys = k.shape[1:3]
        self.tiles, self.x, self.y = *queries.shape[2:], keys.shape[3]
        self.kinds = 0 if bias is None else bias.shape[1]
        self.bias = None if bias is None else bias.to(dtype).flatten(0, 1)
        self.kind = kind
        self.key_mask = None if key_mask is None else key_mask.flatten()
        self.query_index, self.key_index = queries, keys
        self.every_key = bool((keys >= 0).all())
        self.every_query = bool((queries >= 0).all())

    @property
    def total(self) -> int:
        """Tiles of all examples and heads."""
        return self.batch * self.heads * self.tiles

    def runs(self) -> Iterator[Run]:
        """All tiles that have a query, as many at a time as `CHUNK` says."""
        size = max(1, CHUNK.get(self.q.device.type, 2**25) // (self.x * self.y))
        number = torch.arange(self.total, device=self.q.device)
        if self.every_query:
            for start in range(0, self.total, size):
                rows = slice(start, min(start + size, self.total))
                yield self._run(rows, number[rows])
            return
        some = (self.query_index >= 0).any(-1).expand(self.batch, self.heads, -1)
        for rows in number[some.flatten()].split(size):
            yield self._run(rows, rows)

    def _run(self, rows: slice | Tensor, number: Tensor) -> Run:
        sequence, tile = number // self.tiles, number % self.tiles
        example, head = sequence // self.heads, sequence % self.heads
        query_places = self._places(self.query_index, example, head, tile)
        key_places = self._places(self.key_index, example, head, tile)
        kv = example * self.kv_heads + head // (self.heads // self.kv_heads)
        queries, keys = query_places, key_places
        if not self.every_query:
            queries = queries.clamp(min=0)
        if not self.every_key:
            keys = keys.clamp(min=0)
        kinds = None
        if self.bias is not None and self.kind is not None:
            kinds = self.kind[tile] + (head * self.kinds if self.bias.shape[0] > self.kinds else 0)
        return Run(
            rows,
            query_places,
            key_places,
            (queries + sequence[:, None] * self.length).flatten(),
            (keys + kv[:, None] * self.num_keys).flatten(),
            None if self.every_key else key_places < 0,
            kinds,
            (example * self.num_keys).unsqueeze(1),
        )

    def _places(self, index: Tensor, example: Tensor, head: Tensor, tile: Tensor) -> Tensor:
        """The rows (c, places) of an index (1 or b, 1 or h, t, places)."""
        examples, heads = index.shape[:2]
        row = (example * heads if examples > 1 else 0) + (head if heads > 1 else 0)
        return index.flatten(0, 2).index_select(0, row * self.tiles + tile)

    def read(self, name: str, x: Tensor, rows: Tensor, places: int) -> Tensor:
        """Rows of a flat tensor, (c, places, width), in a buffer of that name."""
        out = self.buffers(name, rows.shape[0], x.shape[1])
        return torch.index_select(x, 0, rows, out=out).unflatten(0, (-1, places))

    def keys_of(self, run: Run, name: str, x: Tensor) -> Tensor:
        """Keys or values of a run, (c, y, width); zeros for no key where these take part."""
        tile = self.read(name, x, run.keys, self.y)
        if self.zero_outside and run.no_key is not None:
            tile.masked_fill_(run.no_key.unsqueeze(-1), 0)
        return tile

    def scores(self, run: Run, queries: Tensor, keys: Tensor) -> Tensor:
        """Products and bias as powers of 2, -inf for pairs that are left out, (c, x, y)."""
        scores = torch.bmm(queries, keys.mT, out=self.buffers("scores", len(queries), self.x, self.y))
        if self.bias is not None and run.kinds is not None:
            if len(self.bias) == 1:
                scores.add_(self.bias, alpha=LOG2E)
            else:
                out = self.buffers("bias", *scores.shape)
                scores.add_(torch.index_select(self.bias, 0, run.kinds, out=out), alpha=LOG2E)
        blocked = None if self.zero_outside else run.no_key
        if self.key_mask is not None:
            masked = ~self.key_mask[run.key_places.clamp(min=0) + run.first_keys]
            if run.no_key is not None:
                masked = masked & ~run.no_key if self.zero_outside else masked | run.no_key
            blocked = masked
        if blocked is not None:
            scores.masked_fill_(blocked.unsqueeze(1), float("-inf"))
        if self.causal:
            later, first = run.key_places.int(), run.query_places.int()
            if bool((later.amax(1) > first.amin(1)).any()):
                scores.masked_fill_(later.unsqueeze(1) > first.unsqueeze(2), float("-inf"))
        return scores
