"""Neighbourhood attention in tiles of neighbouring queries."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.neighborhoods import Axis
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention
from attnlab.ops.tile_attention.neighborhood.tiling import table_index, tiles_of


class Arguments(NamedTuple):
    """What `tile_attention` takes for a neighbourhood, and where each pair's bias stands in the flat table."""

    queries: Int[Tensor, "1 1 t x"]
    keys: Int[Tensor, "1 1 t y"]
    kind: Int[Tensor, "t"]
    bias: Float[Tensor, "#h kinds x y"]
    places: Int[Tensor, "kinds x y"]


def arguments(q: Float[Tensor, "b h n d"], axes: tuple[Axis, ...], bias: Float[Tensor, "#h *offsets"] | None) -> Arguments:
    """The tiles of a grid, with -inf for pairs of a tile that do not see each other."""
    queries, keys, kind, allowed, offsets = (t.to(q.device) for t in tiles_of(axes))
    index = table_index(offsets, [axis.window for axis in axes])
    term = q.new_zeros(1, *allowed.shape) if bias is None else bias.flatten(1)[:, index]
    return Arguments(queries[None, None], keys[None, None], kind, term.masked_fill(~allowed, float("-inf")), index)


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
    queries, keys, kind, term, _ = arguments(q, axes, bias)
    output, lse = tile_attention(q, k, v, queries, keys, bias=term, kind=kind, key_mask=key_mask, scale=scale)
    inverse = places_of(queries[0, 0], q.shape[2])
    return from_tiles(output, inverse), lse.flatten(2).index_select(2, inverse)
