"""Sets of places as bits, eight of them a byte, place 8 w + i being bit i of byte w: counts and cuts without unpacking."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor


def packed(x: Bool[Tensor, "*s m"]) -> UInt8[Tensor, "*s w"]:
    """Each row as a set; bits beyond m are 0."""
    eights = torch.nn.functional.pad(x, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8)


def prefixes(number: Int[Tensor, "r"], width: int) -> UInt8[Tensor, "r w"]:
    """The sets of the first so many places, in ``width`` bytes."""
    byte = torch.arange(width, dtype=torch.int32, device=number.device)
    whole, rest = (number // 8).int().unsqueeze(1), ((1 << (number % 8)) - 1).to(torch.uint8).unsqueeze(1)
    return torch.where(byte < whole, 255, torch.where(byte == whole, rest, 0))


def count_bits(x: UInt8[Tensor, "*s"]) -> UInt8[Tensor, "*s"]:
    """How many bits of each byte are 1."""
    twos = x - ((x >> 1) & 0x55)
    fours = (twos & 0x33) + ((twos >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


def sizes(x: UInt8[Tensor, "r w"]) -> Int[Tensor, "r"]:
    """How many places each set has."""
    return count_bits(x).sum(-1)


def firsts(x: UInt8[Tensor, "r w"], number: Int[Tensor, "r"]) -> UInt8[Tensor, "r w"]:
    """The first so many places of each set; all of one that has fewer."""
    each = count_bits(x)
    total = each.cumsum(-1, dtype=torch.int32)
    whole = total <= number.unsqueeze(1)
    # the byte in which the number is reached keeps some of its bits
    cut = whole.sum(-1, keepdim=True).clamp_max_(x.shape[1] - 1)
    byte, left = x.gather(1, cut), number.unsqueeze(1) - total.gather(1, cut) + each.gather(1, cut)
    bits = (byte >> torch.arange(8, dtype=torch.uint8, device=x.device)) & 1
    return (x * whole).scatter_(1, cut, packed((bits > 0) & (bits.cumsum(-1) <= left)))


def members(x: UInt8[Tensor, "r w"], room: int) -> Int[Tensor, "r c"]:
    """The places of each set in order, at most ``room``, -1 behind them."""
    row, byte = x.nonzero().unbind(1)
    eight = torch.arange(8, dtype=torch.uint8, device=x.device)
    pair, bit = ((x[row, byte].unsqueeze(1) >> eight) & 1).nonzero().unbind(1)
    place = byte[pair].mul_(8).add_(bit)
    if len(place) == len(x) * room:
        return place.view(len(x), room)
    row = row[pair]
    number = torch.bincount(row, minlength=len(x))
    slot = torch.arange(len(row), device=x.device) - (number.cumsum(0) - number)[row]
    out = place.new_full((len(x), room), -1)
    out[row, slot] = place
    return out
