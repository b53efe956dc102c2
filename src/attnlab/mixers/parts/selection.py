"""What mechanisms that choose their keys share: pooled blocks, selectors, and choices as places of tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.core.tilings import segments_of


def sequence_blocks(length: int, size: int) -> Int[Tensor, "t x"]:
    """The places of consecutive blocks of a sequence, -1 beyond its end."""
    return segments_of(length, size)


def block_means(
    x: Float[Tensor, "b h n d"], size: int, mask: Bool[Tensor, "b n"] | None = None
) -> tuple[Float[Tensor, "b h t d"], Bool[Tensor, "b t"]]:
    """The mean of each block's real tokens, 0 where it has none, and whether it has any."""
    b, _, n, _ = x.shape
    count = -(-n // size)
    real = x.new_ones(b, n, dtype=torch.bool) if mask is None else mask
    real = torch.nn.functional.pad(real, (0, count * size - n)).unflatten(1, (count, size))
    tokens = torch.nn.functional.pad(x, (0, 0, 0, count * size - n)).unflatten(2, (count, size))
    total = tokens.masked_fill(~real[:, None, :, :, None], 0.0).sum(3)
    number = real.sum(-1)
    return total / number.clamp(min=1).to(x.dtype)[:, None, :, None], number > 0


def top_k(scores: Float[Tensor, "*s m"], count: int, allowed: Bool[Tensor, "*s m"] | None = None) -> Int[Tensor, "*s c"]:
    """The places of the ``count`` largest scores, at most m, largest first; -1 where fewer are allowed."""
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    best = scores.topk(min(count, scores.shape[-1]), dim=-1)
    return best.indices.masked_fill(best.values == float("-inf"), -1)


def smallest_share(weights: Float[Tensor, "*s m"], share: float) -> Bool[Tensor, "*s m"]:
    """The fewest entries, largest first, whose sum reaches ``share`` of the whole; weights are not negative."""
    order = weights.sort(dim=-1, descending=True)
    before = order.values.cumsum(-1) - order.values
    kept = before < share * weights.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order.indices, kept)


def chosen_places(chosen: Bool[Tensor, "*s m"]) -> Int[Tensor, "*s c"]:
    """The places of True in order, -1 behind them; c is the largest number of any row, at least 1."""
    count = max(1, int(chosen.sum(-1).max()))
    place = torch.arange(chosen.shape[-1], device=chosen.device).expand(chosen.shape)
    return (
        place.masked_fill(~chosen, chosen.shape[-1])
        .sort(dim=-1)
        .values[..., :count]
        .masked_fill_(torch.arange(count, device=chosen.device) >= chosen.sum(-1, keepdim=True), -1)
    )


def as_mask(places: Int[Tensor, "*s c"], length: int) -> Bool[Tensor, "*s m"]:
    """The inverse of `chosen_places`, in any order: True at each place named, of ``length``."""
    mask = torch.zeros(*places.shape[:-1], length + 1, dtype=torch.bool, device=places.device)
    return mask.scatter(-1, places.masked_fill(places < 0, length), True)[..., :-1]


def tokens_of_blocks(blocks: Int[Tensor, "*s c"], size: int, length: int) -> Int[Tensor, "*s y"]:
    """The places of the tokens of these blocks, one block behind the other; -1 for no block and beyond ``length``."""
    tokens = blocks.unsqueeze(-1) * size + torch.arange(size, device=blocks.device)
    return tokens.masked_fill((blocks < 0).unsqueeze(-1) | (tokens >= length), -1).flatten(-2)


def group_tiles(group: Int[Tensor, "b h n"], count: int, size: int) -> tuple[Int[Tensor, "b h t x"], Int[Tensor, "b h t"]]:
    """The members of each of ``count`` groups in order, cut into tiles of ``size``, and the group of each tile; -1 for none.

    A group of -1 is none. A group's tiles follow one another. Where a graph is traced there are as many tiles as there can be, so
    that no shape is data, and else as many as are needed.
    """
    n = group.shape[-1]
    room = n // size + count
    group = group.masked_fill(group < 0, count)
    order = group.argsort(dim=-1, stable=True)
    group = group.gather(-1, order)
    number = torch.zeros(*group.shape[:-1], count + 1, dtype=group.dtype, device=group.device)
    number = number.scatter_add(-1, group, torch.ones_like(group))
    tiles = (number + size - 1) // size
    first, start = ((x.cumsum(-1) - x).gather(-1, group) for x in (tiles, number))
    rank = torch.arange(n, device=group.device) - start
    place = (first + rank // size) * size + rank % size
    place = place.masked_fill(group == count, room * size)
    places = order.new_full((*group.shape[:-1], room * size + 1), -1).scatter(-1, place, order)
    owner = order.new_full((*group.shape[:-1], room + 1), -1).scatter(-1, place // size, group)
    traced = torch.compiler.is_compiling() or group.is_meta
    used = room if traced else max(1, int(tiles[..., :-1].sum(-1).max()))
    return places[..., :-1].unflatten(-1, (room, size))[..., :used, :], owner[..., :used]


def sums_at(
    x: Float[Tensor, "b h t x e"], places: Int[Tensor, "b h t x"], length: int
) -> tuple[Float[Tensor, "b h n e"], Int[Tensor, "b h n"]]:
    """The sum of what stands at each of ``length`` places, and how often it is named; -1 is no place."""
    b, h, e = *x.shape[:2], x.shape[-1]
    row = places.flatten(2)
    named = row >= 0
    row = torch.where(named, row, length)
    count = torch.zeros(b, h, length + 1, dtype=torch.int64, device=x.device).scatter_add(2, row, named.long())
    flat = (row + torch.arange(b * h, device=x.device).view(b, h, 1) * (length + 1)).flatten()
    total = x.new_zeros(b * h * (length + 1), e).index_add(0, flat, x.flatten(0, 3))
    return total.view(b, h, length + 1, e)[:, :, :-1], count[..., :-1]
