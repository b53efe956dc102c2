"""The keys that agree best, by sets of bits: what counts is how many sets a key is in, and sums of bits are bits.

For each part and code the keys that have it are a set. A query's sets are added as binary numbers, a bit of the sum a set again,
so that one operation on a byte counts for eight keys; those that agree often enough are a comparison of such numbers. The last
level that fits is taken whole, and the first of the next one.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from attnlab.ops.bit_sets import firsts, members, packed, prefixes, sizes

BYTES = {"cpu": 2**18}
"""Of one set for some queries at a time, by device: few enough for a CPU's cache; 2**25 elsewhere."""


@torch.library.custom_op(
    "attnlab::agreeing_keys",
    mutates_args=(),
    schema="(Tensor queries, Tensor keys, int num_codes, SymInt count, int steps, bool causal, Tensor? key_mask) -> Tensor",
)
def select(
    queries: Int[Tensor, "b h n p"],
    keys: Int[Tensor, "b h m p"],
    num_codes: int,
    count: int,
    steps: int,
    causal: bool,
    key_mask: Bool[Tensor, "b m"] | None,
) -> Int[Tensor, "b h n c"]:
    """See `reference.select`."""
    (b, h, n, parts), m = queries.shape, keys.shape[2]
    real = keys.new_ones(b, m, dtype=torch.bool) if key_mask is None else key_mask
    every = packed(real)
    code = torch.arange(num_codes, device=keys.device).unsqueeze(1)
    sets = torch.stack([packed(x == code) for x in keys.permute(0, 1, 3, 2).reshape(-1, 1, m).unbind(0)]).flatten(0, 1)
    out = queries.new_full((b * h * n, count), -1)
    rows = max(1, BYTES.get(keys.device.type, 2**25) // every.shape[1])
    first = torch.arange(parts, device=keys.device) * num_codes
    for number in torch.arange(len(out), device=keys.device).split(rows):
        sequence = number // n
        # where causal, the bytes up to the latest query's
        width = min(int((number % n).max()) // 8 + 1, every.shape[1]) if causal else every.shape[1]
        allowed = every[:, :width].index_select(0, sequence // h)
        if causal:
            allowed &= prefixes(number % n + 1, width)
        which = queries.view(-1, parts)[number] + first + (sequence * (parts * num_codes)).unsqueeze(1)
        levels = _levels(sets[:, :width], which, allowed, steps)
        out[number] = members(_largest(levels, count), count)
    return out.view(b, h, n, count)


@select.register_fake
def _(queries: Tensor, keys: Tensor, num_codes: int, count: int, *rest: Any) -> Tensor:
    return queries.new_empty(*queries.shape[:3], count)


def _levels(
    sets: UInt8[Tensor, "s w"], which: Int[Tensor, "r p"], allowed: UInt8[Tensor, "r w"], steps: int
) -> list[UInt8[Tensor, "r w"]]:
    """The allowed keys with each number of steps or more, from the largest number to 0."""
    parts = which.shape[1]
    step = max(1, parts // (steps + 1))
    total = [torch.zeros_like(allowed) for _ in range(parts.bit_length())]
    for part in range(parts):
        carry = sets.index_select(0, which[:, part])
        for digit in total[: (part + 1).bit_length()]:
            both = digit & carry
            digit ^= carry
            carry = both
    return [_at_least(total, least).bitwise_and_(allowed) for least in range(min(steps, parts // step) * step, 0, -step)] + [
        allowed
    ]


def _at_least(total: list[Tensor], least: int) -> Tensor:
    """Where a number that is given by its digits, the smallest first, is no less."""
    found = torch.full_like(total[0], 255)
    for place, digit in enumerate(total):
        found = digit & found if (least >> place) & 1 else digit | found
    return found


def _largest(levels: list[Tensor], count: int) -> UInt8[Tensor, "r w"]:
    """The first ``count`` places in the order of these nested sets, then of place."""
    whole, partly = torch.zeros_like(levels[0]), torch.zeros_like(levels[0])
    fits = torch.full_like(levels[0][:, :1], 255)
    for level in levels:
        partly |= level & fits
        fits = (sizes(level).unsqueeze(1) <= count).to(torch.uint8) * 255
        whole |= level & fits
    return firsts(partly & ~whole, count - sizes(whole)).bitwise_or_(whole)
