"""Spans of a sequence as single keys: pooled queries and keys, prefixes along rows and columns."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.partials import Partial, merge
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention


class Sources(NamedTuple):
    """What is attended: keys (b, hk, m, d), values (b, hk, m, e), and which of them may be used."""

    k: Float[Tensor, "b hk m d"]
    v: Float[Tensor, "b hk m e"]
    real: Bool[Tensor, "b m"]


def read(
    q: Float[Tensor, "b h n d"],
    sources: Sources,
    queries: Int[Tensor, "t x"],
    keys: Int[Tensor, "t y"],
    *,
    allowed: Bool[Tensor, "x y"] | None = None,
    causal: bool = False,
) -> Partial:
    """Attention inside tiles in the order of the queries, of which each stands in one tile; logits are not scaled.

    Args:
        q: queries, scaled already.
        sources: keys, values and mask.
        queries: places of each tile's queries, -1 for none.
        keys: places of each tile's keys, likewise.
        allowed: which pairs of a tile count, alike in all tiles.
        causal: a query uses no key from a later place.
    """
    bias = None if allowed is None else q.new_zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[None, None]
    queries, keys = queries.to(q.device), keys.to(q.device)
    found = tile_attention(
        q,
        sources.k,
        sources.v,
        queries[None, None],
        keys[None, None],
        bias=bias,
        causal=causal,
        key_mask=sources.real,
        scale=1.0,
    )
    inverse = places_of(queries, q.shape[2])
    return Partial(from_tiles(found.output, inverse), found.lse.flatten(2, 3).index_select(2, inverse))


def merged(*parts: Partial) -> Float[Tensor, "b h n e"]:
    """One softmax over all parts."""
    total = parts[0]
    for part in parts[1:]:
        total = merge(total, part)
    return total.output


def pooled(
    x: Float[Tensor, "b h s y d"], real: Bool[Tensor, "b s y"], activation: str, reduction: str
) -> Float[Tensor, "b h s d"]:
    """The real tokens of each span as one: "max", "mean" or "sum" after "identity" or "relu"; 0 where there is none."""
    x = x.relu() if activation == "relu" else x
    absent = ~real[:, None, :, :, None]
    if reduction == "max":
        empty = ~real.any(-1)[:, None, :, None]
        return x.masked_fill(absent, float("-inf")).amax(3).masked_fill(empty, 0.0)
    total = x.masked_fill(absent, 0.0).sum(3)
    return total if reduction == "sum" else total / real.sum(-1).clamp(min=1).to(x.dtype)[:, None, :, None]
