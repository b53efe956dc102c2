"""How sliding-window attention is cut up: blocks of queries, chunks of blocks, and the keys that a chunk sees.

The keys are padded once, so that block i of the queries sees keys ``i * block`` to ``i * block + span`` of the padded ones,
through overlapping strides and without a copy. Sinks are a second set of keys under the same softmax.

Letters: R pairs of a sequence and a key head, r query heads of a key head, B blocks, w queries of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.ops.buffers import Buffers

BLOCK, WIDE = 32, 192
"""Queries in a block, at most; twice as many for windows of `WIDE` keys or more, whose blocks then waste little."""


@dataclass(frozen=True)
class Plan:
    """Sizes of one call; positions are counted from the first key."""

    queries: int
    keys: int
    left: int
    right: int
    group: int
    blocks: int
    block: int

    @classmethod
    def of(cls, queries: int, keys: int, left: int, right: int, group: int) -> Plan:
        """Blocks of one length that cover the queries."""
        # No key is further from a query than these, so a wider window would only add padding.
        left, right = min(left, keys - 1), min(right, queries - 1)
        blocks = -(-queries // (BLOCK if left + right + 1 < WIDE else 2 * BLOCK))
        return cls(queries, keys, left, right, group, blocks, -(-queries // blocks))

    @property
    def span(self) -> int:
        """Keys that a block of queries sees."""
        return self.block + self.left + self.right

    @property
    def tiles(self) -> int:
        """Blocks of keys that a block of queries touches, the last in part."""
        return -(-self.span // self.block)

    @property
    def padded(self) -> int:
        """Length of the padded keys, in whole blocks."""
        return (self.blocks + self.tiles - 1) * self.block

    @property
    def first(self) -> int:
        """The position of the first padded key; negative where there is padding."""
        return self.keys - self.queries - self.left

    @property
    def real(self) -> slice:
        """The padded keys that are keys, [start, stop) in padded places; ``first`` added gives their positions."""
        return slice(max(0, -self.first), min(self.padded, self.keys - self.first))

    def chunks(self, rows: int, size: int) -> Iterator[Chunk]:
        """Whole rows while they are short, otherwise parts of a row, of about ``size`` scores."""
        count = max(1, size // (self.group * self.block * self.span))
        height, length = max(1, count // self.blocks), min(count, self.blocks)
        for row in range(0, rows, height):
            for block in range(0, self.blocks, length):
                yield Chunk(slice(row, min(row + height, rows)), slice(block, min(block + length, self.blocks)))


@dataclass(frozen=True)
class Chunk:
    """The blocks that are computed together."""

    rows: slice
    blocks: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(R, B)."""
        return self.rows.stop - self.rows.start, self.blocks.stop - self.blocks.start


class Keys(ABC):
    """Keys and values (R tokens d), zeros where they are masked, and what a chunk of queries does with them.

    Subclasses say which keys a chunk sees, and with which additive masks.
    """

    k: Tensor
    v: Tensor
    name: str

    def __init__(self, plan: Plan, buffers: Buffers) -> None:
        self.plan, self.buffers = plan, buffers

    @abstractmethod
    def seen(self, x: Tensor, chunk: Chunk) -> Tensor:
        """The rows of ``x`` that each product sees, transposed: (products, d, keys)."""

    @abstractmethod
    def masks(self, chunk: Chunk) -> list[Tensor]:
        """What is to be added to scores (R B r w keys)."""

    @abstractmethod
    def accumulate(self, total: Tensor, parts: Tensor, chunk: Chunk) -> None:
        """Add a chunk's gradients (products keys d) to those of all keys."""

    @abstractmethod
    def deliver(self, total: Tensor, out: Tensor) -> None:
        """Add a total (R tokens d) to the gradient of the argument (b hk m d)."""

    def scores(self, queries: Tensor, chunk: Chunk) -> Tensor:
        """(products rows keys), masked."""
        scores = self.products(queries, self.k, chunk, "scores")
        for mask in self.masks(chunk):
            scores.view(*queries.shape[:-1], -1).add_(mask)
        return scores

    def products(self, rows: Tensor, x: Tensor, chunk: Chunk, name: str) -> Tensor:
        """Rows (R B r w d) times what they see of ``x``, in a buffer."""
        seen = self.seen(x, chunk)
        rows = rows.view(len(seen), -1, rows.shape[-1])
        return torch.bmm(rows, seen, out=self.buffers(self.name + name, *rows.shape[:2], seen.shape[-1]))

    def read(self, weights: Tensor, x: Tensor, chunk: Chunk) -> Tensor:
        """Weights (products rows keys) times what they see of ``x``, as (all rows, d)."""
        return torch.bmm(weights, self.seen(x, chunk).mT).flatten(0, 1)

    def spread(self, total: Tensor, weights: Tensor, rows: Tensor, chunk: Chunk) -> None:
        """Add transposed weights times rows (R B r w d) to ``total``."""
        rows = rows.view(len(weights), -1, rows.shape[-1])
        shape = (len(weights), weights.shape[-1], rows.shape[-1])
        self.accumulate(total, torch.bmm(weights.mT, rows, out=self.buffers(self.name + "parts", *shape)), chunk)


class Window(Keys):
    """The keys around each query."""

    name = "window"

    def __init__(self, plan: Plan, buffers: Buffers, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
        super().__init__(plan, buffers)
        real, first = plan.real, plan.first
        positions = slice(real.start + first, real.stop + first)
        self.k, self.v = (self._pad(x[:, :, positions]) for x in (k, v))
        bias = k.new_full((1, plan.padded), -torch.inf)
        bias[:, real] = 0
        if key_mask is not None:
            bias = bias.repeat(len(self.k), 1)
            bias[:, real].masked_fill_(~key_mask[:, positions].repeat_interleave(k.shape[1], 0), -torch.inf)
        self.bias, self.all_real = bias, key_mask is None
        ahead = torch.arange(plan.span, device=k.device) - torch.arange(plan.block, device=k.device)[:, None]
        outside = (ahead < 0) | (ahead > plan.left + plan.right)
        self.band = torch.zeros_like(outside, dtype=k.dtype).masked_fill_(outside, -torch.inf)

    def _pad(self, x: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:2], self.plan.padded, x.shape[-1])
        out[:, :, self.plan.real] = x
        return out.flatten(0, 1)

    def _windows(self, x: Tensor, chunk: Chunk) -> Tensor:
        block = self.plan.block
        part = x[:, chunk.blocks.start * block : (chunk.blocks.stop - 1) * block + self.plan.span]
        return part.unfold(1, self.plan.span, block)

    def seen(self, x: Tensor, chunk: Chunk) -> Tensor:
        """A span of keys for each block."""
        return self._windows(x[chunk.rows], chunk).flatten(0, 1)

    def masks(self, chunk: Chunk) -> list[Tensor]:
        """The band, and at the borders or under a mask also which of the keys are real."""
        block, real = self.plan.block, self.plan.real
        start, stop = chunk.blocks.start * block, (chunk.blocks.stop - 1) * block + self.plan.span
        if self.all_real and real.start <= start and stop <= real.stop:
            return [self.band]
        bias = self.bias if self.all_real else self.bias[chunk.rows]
        return [self.band, self._windows(bias, chunk)[:, :, None, None]]

    def accumulate(self, total: Tensor, parts: Tensor, chunk: Chunk) -> None:
        """Fold the overlapping spans: tile after tile of them, so that no two blocks add to the same place at once."""
        block, blocks = self.plan.block, chunk.blocks
        parts = parts.unflatten(0, chunk.shape)
        tiles = total[chunk.rows].unflatten(1, (-1, block))
        for tile in range(self.plan.tiles):
            part = parts[:, :, tile * block : (tile + 1) * block]
            tiles[:, blocks.start + tile : blocks.stop + tile, : part.shape[2]] += part

    def deliver(self, total: Tensor, out: Tensor) -> None:
        """Leave the padding out."""
        real, first = self.plan.real, self.plan.first
        out[:, :, real.start + first : real.stop + first] += total[:, real].unflatten(0, out.shape[:2])


class Sinks(Keys):
    """The first keys of all, for the queries whose window begins after them."""

    name = "sinks"

    def __init__(self, plan: Plan, buffers: Buffers, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
        super().__init__(plan, buffers)
        self.k, self.v = k.flatten(0, 1), v.flatten(0, 1)
        self.places = torch.arange(k.shape[2], device=k.device)
        self.bias = None
        if key_mask is not None:
            masked = ~key_mask.repeat_interleave(k.shape[1], 0)
            self.bias = torch.zeros_like(masked, dtype=k.dtype).masked_fill_(masked, -torch.inf)

    def seen(self, x: Tensor, chunk: Chunk) -> Tensor:
        """All sinks, for all of a row's queries."""
        return x[chunk.rows].mT

    def masks(self, chunk: Chunk) -> list[Tensor]:
        """Which sinks are real, and, near the start, which are not in the window already."""
        block, blocks = self.plan.block, chunk.blocks
        masks = [] if self.bias is None else [self.bias[chunk.rows, None, None, None]]
        if self.plan.first + blocks.start * block < len(self.places):
            begins = self.plan.first + torch.arange(blocks.start * block, blocks.stop * block, device=self.k.device)
            inside = self.places >= begins.view(-1, 1, block, 1)
            masks.append(torch.zeros_like(inside, dtype=self.k.dtype).masked_fill_(inside, -torch.inf))
        return masks

    def accumulate(self, total: Tensor, parts: Tensor, chunk: Chunk) -> None:
        """Every chunk of a row adds to the same keys."""
        total[chunk.rows] += parts

    def deliver(self, total: Tensor, out: Tensor) -> None:
        """To the first keys."""
        out[:, :, : len(self.places)] += total.unflatten(0, out.shape[:2])
