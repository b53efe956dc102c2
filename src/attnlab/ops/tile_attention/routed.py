"""Attention where every query chooses its own blocks of keys: the queries of a block are gathered, and the parts merged."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.partials import Partial
from attnlab.ops.tile_attention import tile_attention

QUERIES = 64
"""Queries of a tile, at most: a block that many queries choose is cut into several tiles."""


def routed_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    chosen: Bool[Tensor, "b h n c"],
    blocks: Int[Tensor, "t y"],
    *,
    most: int | None = None,
    causal: bool = False,
    key_mask: Bool[Tensor, "b m"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Partial:
    r"""Softmax attention of each query over the keys of the blocks that it has chosen.

    $$o_i = \sum_{c \in C(i)} \sum_{j \in \mathrm{block}_c} \mathrm{softmax}_j(s\, q_i^\top k_j)\, v_j$$

    Work O(choices y (d + e)), memory O(choices e): no query's keys are gathered for it alone.

    Args:
        q: queries; h is a multiple of hk.
        k: keys.
        v: values.
        chosen: which blocks each query of each head uses.
        blocks: the places of each block's keys, -1 for none; a key may stand in one block alone.
        most: blocks that any query chooses, at most; all by default. Memory is that of so many.
        causal: a query uses no key from a later place.
        key_mask: True marks a real key.
        scale: s, by default $d^{-1/2}$.
        backend: that of `tile_attention`.

    Returns:
        ``output`` (b, h, n, e) and ``lse`` (b, h, n); a query without a key has 0 and -inf.

    Raises:
        ValueError: a shape does not fit the others.
    """
    if tuple(chosen.shape) != (*q.shape[:3], len(blocks)):
        raise ValueError(f"chosen: expected {(*q.shape[:3], len(blocks))}, got {tuple(chosen.shape)}")
    queries, block = _tiles(chosen, len(blocks) if most is None else most)
    keys = torch.where((block < 0).unsqueeze(-1), -1, blocks[block.clamp(min=0)])
    parts = tile_attention(q, k, v, queries, keys, causal=causal, key_mask=key_mask, scale=scale, backend=backend)
    return _merged(parts, queries, q.shape[2])


def _tiles(chosen: Bool[Tensor, "b h n c"], most: int) -> tuple[Int[Tensor, "b h t x"], Int[Tensor, "b h t"]]:
    """The queries of each tile and its block, -1 for none; a block's queries are in order.

    How many tiles there are is data; there is room for as many as there can be, so that shapes are not.
    """
    b, h, n, blocks = chosen.shape
    size = min(QUERIES, n)
    room = n * min(most, blocks) // size + blocks
    by_block = chosen.mT.long()
    tiles = (by_block.sum(-1) + size - 1) // size
    first = tiles.cumsum(-1) - tiles
    rank = by_block.cumsum(-1) - 1
    place = (first.unsqueeze(-1) + rank // size) * size + rank % size
    place = place.masked_fill(by_block == 0, room * size).flatten(2)
    query = torch.arange(n, device=chosen.device).expand(b, h, blocks, n).flatten(2)
    queries = torch.full((b, h, room * size + 1), -1, device=chosen.device).scatter(2, place, query)
    owner = torch.arange(blocks, device=chosen.device).repeat_interleave(n).expand(b, h, -1)
    owners = torch.full((b, h, room + 1), -1, device=chosen.device).scatter(2, place // size, owner)
    return queries[..., :-1].unflatten(2, (room, size)), owners[..., :room]


def _merged(parts: Partial, queries: Int[Tensor, "b h t x"], length: int) -> Partial:
    """The parts of each query as one."""
    b, h, _, e = *parts.output.shape[:2], 0, parts.output.shape[-1]
    place = queries.flatten(2)
    real = place >= 0
    place = place.clamp(min=0)
    lse = parts.lse.flatten(2)
    present = real & (lse > float("-inf"))
    top = lse.new_full((b, h, length), float("-inf")).scatter_reduce(2, place, lse.detach(), "amax")
    shift = top.masked_fill(top == float("-inf"), 0.0)
    weight = (lse.masked_fill(~present, 0.0) - shift.gather(2, place)).exp().masked_fill(~present, 0.0)
    total = torch.zeros_like(top).scatter_add(2, place, weight)
    some = total > 0
    total = total.masked_fill(~some, 1.0)
    share = (weight / total.gather(2, place)).unsqueeze(-1).to(parts.output.dtype)
    row = place + torch.arange(b * h, device=place.device).view(b, h, 1) * length
    output = parts.output.new_zeros(b * h * length, e)
    output = output.index_add(0, row.flatten(), (parts.output.flatten(2, 3) * share).flatten(0, 2))
    return Partial(output.view(b, h, length, e), (total.log() + shift).masked_fill(~some, float("-inf")))
