"""The pairs of HyperAttention as tiles: queries with the block of sorted keys that is theirs, and with sampled keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from attnlab.mixers.parts.selection import group_tiles
from attnlab.ops.partials import Partial


class Side(NamedTuple):
    """Queries or keys of p problems side by side, each of so many consecutive tokens.

    Args:
        bucket: of each token.
        real: which take part.
        start: the place of the first one of each problem.
    """

    bucket: Int[Tensor, "b h p n"]
    real: Bool[Tensor, "b p n"]
    start: Int[Tensor, "p"]


class Tiles(NamedTuple):
    """Queries (b, h, t, x) with keys of their block (b, h, t, y) and samples (b, h, t, s), -1 for none; a problem a tile."""

    queries: Int[Tensor, "b h t x"]
    keys: Int[Tensor, "b h t y"]
    samples: Int[Tensor, "b h t s"]
    problem: Int[Tensor, "b h t"]


def sorted_places(side: Side, num_buckets: int) -> tuple[Int[Tensor, "b h p n"], Int[Tensor, "b h p n"], Int[Tensor, "b 1 p"]]:
    """The places of real tokens by bucket, -1 behind them, these buckets, and how many are real."""
    bucket = side.bucket.masked_fill(~side.real.unsqueeze(1), num_buckets)
    found = bucket.sort(dim=-1, stable=True)
    number = side.real.sum(-1).unsqueeze(1)
    behind = torch.arange(bucket.shape[-1], device=bucket.device) >= number.unsqueeze(-1)
    places = (found.indices + side.start.unsqueeze(-1)).masked_fill(behind, -1)
    return places, found.values, number


def hyper_tiles(
    queries: Side,
    keys: Side,
    ranks: Int[Tensor, "b h p s"],
    *,
    block: int,
    num_buckets: int,
    by_rank: bool,
    mask_own_block: bool,
) -> Tiles:
    """The tiles of some problems of the same size.

    Args:
        queries: of every problem.
        keys: likewise.
        ranks: samples, as places among the sorted keys.
        block: of sorted keys.
        num_buckets: of the hash.
        by_rank: a query's block is that of its own rank among the sorted queries; otherwise that of the keys in its bucket, or
            where they would be, which other queries do not change.
        mask_own_block: no samples from the query's own block.
    """
    sorted_keys, key_buckets, num_keys = sorted_places(keys, num_buckets)
    problems, width = sorted_keys.shape[2:]
    blocks = -(-width // block)
    if by_rank:
        own = _block_by_rank(queries, num_keys, block, num_buckets)
    else:
        own = _block_of_bucket(queries, key_buckets, num_keys, block)
    own = own.masked_fill(~queries.real.unsqueeze(1) | (num_keys == 0).unsqueeze(-1), -1)
    problem = torch.arange(problems, device=own.device)
    group = torch.where(own < 0, -1, own + (problem * blocks).unsqueeze(-1)).flatten(2)
    members, owner = group_tiles(group, problems * blocks, min(block, queries.bucket.shape[-1]))
    length = queries.bucket.shape[-1]
    places = members + (queries.start - problem * length)[members.clamp(min=0) // length]
    places = places.masked_fill(members < 0, -1)
    of = owner.clamp(min=0)
    tables = F.pad(sorted_keys, (0, blocks * block - width), value=-1).unflatten(-1, (blocks, block)).flatten(2, 3)
    tile_keys = _rows(tables, of).masked_fill((owner < 0).unsqueeze(-1), -1)
    samples = sorted_keys.gather(-1, ranks)
    # one block holds everything: there is nothing to sample
    samples = samples.masked_fill((num_keys <= block).unsqueeze(-1), -1)
    tile_samples = _rows(samples, of // blocks)
    if mask_own_block:
        tile_samples = tile_samples.masked_fill(_rows(ranks // block, of // blocks) == (of % blocks).unsqueeze(-1), -1)
    return Tiles(places, tile_keys, tile_samples.masked_fill((owner < 0).unsqueeze(-1), -1), of // blocks)


def to_tokens(part: Partial, queries: Int[Tensor, "b h t x"], length: int) -> Partial:
    """What tiles hold for each of ``length`` tokens, each in one tile or in none, where it is the empty part."""
    place = queries.flatten(2)
    number = torch.arange(place.shape[-1], device=place.device).expand_as(place)
    inverse = place.new_full((*place.shape[:2], length + 1), -1)
    inverse = inverse.scatter(2, place.masked_fill(place < 0, length), number)[..., :-1]
    nobody, inverse = inverse < 0, inverse.clamp(min=0)
    output = part.output.flatten(2, 3).gather(2, inverse.unsqueeze(-1).expand(-1, -1, -1, part.output.shape[-1]))
    lse = part.lse.flatten(2, 3).gather(2, inverse)
    return Partial(output.masked_fill(nobody.unsqueeze(-1), 0.0), lse.masked_fill(nobody, float("-inf")))


def _rows(x: Int[Tensor, "b h r c"], index: Int[Tensor, "b h t"]) -> Int[Tensor, "b h t c"]:
    return x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def _block_by_rank(queries: Side, num_keys: Int[Tensor, "b 1 p"], block: int, num_buckets: int) -> Int[Tensor, "b h p n"]:
    """Sorted queries are cut into as many blocks as sorted keys."""
    bucket = queries.bucket.masked_fill(~queries.real.unsqueeze(1), num_buckets)
    rank = bucket.argsort(dim=-1, stable=True).argsort(dim=-1)
    number = queries.real.sum(-1).unsqueeze(1)
    blocks = ((num_keys + block - 1) // block).clamp(min=1)
    size = ((number + block - 1) // block * block + blocks - 1) // blocks
    return (rank // size.clamp(min=1).unsqueeze(-1)).clamp(max=_last(num_keys, block))


def _block_of_bucket(
    queries: Side, buckets: Int[Tensor, "b h p m"], num_keys: Int[Tensor, "b 1 p"], block: int
) -> Int[Tensor, "b h p n"]:
    """The block of the middle one of the sorted keys in a query's bucket, or of the first one behind it."""
    bucket = queries.bucket.contiguous()
    left, right = (torch.searchsorted(buckets, bucket, right=side) for side in (False, True))
    middle = (left + right) // 2
    return (middle // block).clamp(max=_last(num_keys, block))


def _last(num_keys: Int[Tensor, "b 1 p"], block: int) -> Int[Tensor, "b 1 p 1"]:
    """The last block with a key."""
    return ((num_keys - 1).clamp(min=0) // block).unsqueeze(-1)
