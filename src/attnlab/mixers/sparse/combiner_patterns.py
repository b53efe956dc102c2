"""Combiner's patterns: which keys a query uses itself, and which spans it uses as one key each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.core.tilings import segments_of
from attnlab.mixers.parts.span_summaries import Sources, merged, pooled, read


@dataclass(frozen=True)
class Layout:
    """Tokens in rows, and how a span becomes a key.

    Args:
        rows: S.
        length: L, tokens of a row; there are S L tokens, those beyond the sequence masked.
        causal: no later token is used.
        activation: of the tokens that are pooled.
        reduction: how they are pooled.
        row_summary: of "axial": "none" or "wsum".
    """

    rows: int
    length: int
    causal: bool
    activation: str
    reduction: str
    row_summary: str

    @property
    def by_row(self) -> Int[Tensor, "s l"]:
        """The places of each row's tokens."""
        return torch.arange(self.rows * self.length).view(self.rows, self.length)

    @property
    def by_column(self) -> Int[Tensor, "l s"]:
        """The places of each column's tokens."""
        return self.by_row.T.contiguous()

    def earlier(self, device: torch.device) -> Bool[Tensor, "s s"]:
        """Rows before a row."""
        return torch.ones(self.rows, self.rows, dtype=torch.bool, device=device).tril(-1)


def fixed(q: Float[Tensor, "b h n d"], tokens: Sources, layout: Layout) -> Float[Tensor, "b h n e"]:
    """Own row directly, rows as spans; where not causal the own row is among the spans too."""
    shape, rows = (layout.rows, layout.length), layout.by_row
    real = tokens.real.unflatten(1, shape)
    how = (real, layout.activation, layout.reduction)
    span_q, span_k = pooled(q.unflatten(2, shape), *how), pooled(tokens.k.unflatten(2, shape), *how)
    values = read(span_q, tokens, torch.arange(layout.rows)[:, None], rows).output
    spans = Sources(_for_heads(span_k, q), values, real.any(-1))
    keys = torch.arange(layout.rows).expand(layout.rows, -1)
    if layout.causal:
        keys = keys.masked_fill(keys >= torch.arange(layout.rows)[:, None], -1)
    return merged(read(q, tokens, rows, rows, causal=layout.causal), read(q, spans, rows, keys))


def axial(q: Float[Tensor, "b h n d"], tokens: Sources, layout: Layout) -> Float[Tensor, "b h n e"]:
    """Own row directly; of the other rows the token in the own column, with its view of its row as its value."""
    rows, columns = layout.by_row, layout.by_column
    width = tokens.k.shape[-1]
    if layout.row_summary == "wsum":
        both = tokens._replace(v=torch.cat((tokens.k, tokens.v), dim=-1))
        k, v = read(q, both, rows, rows).output.split((width, tokens.v.shape[-1]), dim=-1)
    else:
        k, v = _for_heads(tokens.k, q), read(q, tokens, rows, rows).output
    allowed = layout.earlier(q.device) if layout.causal else None
    views = Sources(k, v, tokens.real)
    return merged(read(q, tokens, rows, rows, causal=layout.causal), read(q, views, columns, columns, allowed=allowed))


def mixture(q: Float[Tensor, "b h n d"], tokens: Sources, layout: Layout) -> Float[Tensor, "b h n e"]:
    """Own row and column directly; parts of all columns and of all rows as spans."""
    rows, columns = layout.by_row, layout.by_column
    above, left, right = (_part(q, tokens, layout, *which) for which in ((0, False), (1, False), (1, True)))
    if not layout.causal:
        below = _part(q, tokens, layout, 0, True)
        return merged(
            read(q, tokens, rows, rows),
            read(q, tokens, columns, columns),
            *(read(q, part, rows, rows) for part in (above, below)),
            *(read(q, part, columns, columns) for part in (left, right)),
        )
    earlier = layout.earlier(q.device)
    other = ~torch.eye(layout.length, dtype=torch.bool, device=q.device)
    return merged(
        read(q, tokens, rows, rows, causal=True),
        read(q, above, rows, rows, allowed=other),
        *(read(q, part, columns, columns, allowed=earlier) for part in (tokens, left, right)),
    )


def logsparse(q: Float[Tensor, "b h n d"], tokens: Sources, layout: Layout) -> Float[Tensor, "b h n e"]:
    """The token itself; all others in dyadic blocks, the siblings of the blocks that it is in."""
    n = q.shape[2]
    place = torch.arange(n)
    levels = [Sources(_for_heads(tokens.k, q), _for_heads(tokens.v, q), tokens.real)]
    named, first = [place], 0
    for level in range((n - 1).bit_length()):
        size = 2**level
        if level:
            first += len(levels[-1].k[0, 0])
            levels.append(_blocks(q, tokens, layout, size))
        sibling = place // size ^ 1
        gone = sibling * size >= n
        if layout.causal:
            gone = gone | (sibling * size > place)
        named.append((sibling + first).masked_fill(gone, -1))
    spans = Sources(*(torch.cat(parts, dim) for parts, dim in zip(zip(*levels, strict=True), (2, 2, 1), strict=True)))
    return read(q, spans, place[:, None], torch.stack(named, 1)).output


PATTERNS: dict[str, Callable[[Tensor, Sources, Layout], Tensor]] = {
    "fixed": fixed,
    "axial": axial,
    "mixture": mixture,
    "logsparse": logsparse,
}
"""The patterns by name; queries are scaled, tokens that take no part are zero."""


def _blocks(q: Tensor, tokens: Sources, layout: Layout, size: int) -> Sources:
    """Consecutive blocks as spans."""
    n = q.shape[2]
    blocks = segments_of(n, size)
    q_rows, k_rows = (F.pad(x, (0, 0, 0, blocks.numel() - n)).unflatten(2, blocks.shape) for x in (q, tokens.k))
    real = F.pad(tokens.real, (0, blocks.numel() - n)).unflatten(1, blocks.shape)
    how = (real, layout.activation, layout.reduction)
    values = read(pooled(q_rows, *how), tokens, torch.arange(len(blocks))[:, None], blocks).output
    return Sources(_for_heads(pooled(k_rows, *how), q), values, real.any(-1))


def _part(q: Tensor, tokens: Sources, layout: Layout, axis: int, reverse: bool) -> Sources:
    """At each place the span of all tokens before it along an axis (after it if ``reverse``), by sums of queries and keys.

    Where not causal, an empty span is there nevertheless: a key of zeros, whose value is the mean of its line.
    """
    shape = (layout.rows, layout.length)
    lines = layout.by_column if axis == 0 else layout.by_row
    size = shape[axis]
    inside = torch.ones(size, size, dtype=torch.bool, device=q.device)
    real = tokens.real.unflatten(1, shape)

    def sums(x: Tensor) -> Tensor:
        x = x.flip(axis + 2) if reverse else x
        x = x.cumsum(axis + 2)
        return x.flip(axis + 2) if reverse else x

    def before(x: Tensor, dim: int) -> Tensor:
        """What stands one place earlier along the axis, zeros at its beginning."""
        zeros = torch.zeros_like(x.narrow(dim, 0, 1))
        kept = x.narrow(dim, 1, size - 1) if reverse else x.narrow(dim, 0, size - 1)
        return torch.cat((kept, zeros) if reverse else (zeros, kept), dim)

    query = sums(q.unflatten(2, shape)).flatten(2, 3)
    value = read(query, tokens, lines, lines, allowed=inside.triu() if reverse else inside.tril()).output
    value = before(value.unflatten(2, shape), axis + 2)
    key = before(sums(tokens.k.unflatten(2, shape)), axis + 2)
    some = before(sums(real[:, None].long())[:, 0] > 0, axis + 1)
    if not layout.causal:
        count = real.sum(axis + 1, keepdim=True)
        mean = tokens.v.unflatten(2, shape).sum(axis + 2, keepdim=True) / count.clamp(min=1).to(q.dtype)[:, None, ..., None]
        value = torch.where(some[:, None, ..., None], value, _for_heads(mean, q))
        some = (count > 0).expand_as(some)
    return Sources(_for_heads(key.flatten(2, 3), q), value.flatten(2, 3), some.flatten(1, 2))


def _for_heads(x: Tensor, q: Tensor) -> Tensor:
    """One of these for each head of the queries."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
