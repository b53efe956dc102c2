"""Neighbourhood attention in tiles of neighbouring queries."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.neighborhood.rules import Axis
from attnlab.ops.neighborhood.tiling import table_index, tiles_of
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n e"],
    axes: tuple[Axis, ...],
    bias: Float[Tensor, "#h *offsets"] | None,
    key_mask: Bool[Tensor, "b n"] | None,
    scale: float,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """See `reference.attend`."""
    queries, keys, kind, allowed, offsets = (t.to(q.device) for t in tiles_of(axes))
    if bias is None:
        term = q.new_zeros(1, *allowed.shape)
    else:
        term = bias.flatten(1)[:, table_index(offsets, [axis.window for axis in axes])]
    term = term.masked_fill(~allowed, float("-inf"))
    output, lse = tile_attention(
        q, k, v, queries[None, None], keys[None, None], bias=term, kind=kind, key_mask=key_mask, scale=scale
    )
    inverse = places_of(queries, q.shape[2])
    return from_tiles(output, inverse), lse.flatten(2).index_select(2, inverse)
