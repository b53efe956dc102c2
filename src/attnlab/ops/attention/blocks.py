"""Dense attention in blocks of queries against all keys they can reach, both directions, with all slots.

Nothing of size n x m is kept: a block's weights live in one buffer and are computed again in the backward pass. A block is as
large as the caches like, 256 rows of one head at a length of some thousands, many heads and examples at once at small lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.masks import causal_pairs
from attnlab.ops.attention.normalizers import Normalizer

ROWS, BUDGET = 256, 1 << 20  # rows of a block at most; elements of a block aimed at


@dataclass(frozen=True)
class Problem:
    """The inputs of a call, in the dtype in which sums run; ``q`` holds the scale already.

    Tables by offset have all heads; see `attnlab.ops.attention.pairwise.Pairwise` for their rows.
    """

    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b hk m d"]
    v: Float[Tensor, "b hk m e"]
    bias: Float[Tensor, "#b #h #n #m"] | None
    offsets: Float[Tensor, "h r"] | None
    keys: Float[Tensor, "h r d"] | None
    factor: Float[Tensor, "#b #h #n #m"] | None
    factor_offsets: Float[Tensor, "h r"] | None
    key_mask: Bool[Tensor, "b m"] | None
    pair_mask: Bool[Tensor, "#b #h n m"] | None
    causal: bool
    normalizer: Normalizer

    @property
    def groups(self) -> int:
        """Query heads a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def can_be_empty(self) -> bool:
        """Whether a query may be left without a key."""
        return self.key_mask is not None or self.pair_mask is not None or self.q.shape[2] > self.k.shape[2]


class Block(NamedTuple):
    """Examples, key heads, query heads and rows of a block, and how many keys its rows reach."""

    examples: slice
    key_heads: slice
    heads: slice
    rows: slice
    reach: int

    @property
    def height(self) -> int:
        """Number of rows."""
        return int(self.rows.stop - self.rows.start)


def blocks(p: Problem) -> Iterator[Block]:
    """The blocks of a problem; those that reach no key are left out."""
    (b, h, n, _), (_, hk, m, _) = p.q.shape, p.k.shape
    rows = max(1, min(n, ROWS, max(16, BUDGET // (p.groups * m))))
    heads = max(1, min(hk, BUDGET // (p.groups * rows * m)))
    examples = max(1, min(b, BUDGET // (h * rows * m))) if heads == hk else 1
    for example in range(0, b, examples):
        for head in range(0, hk, heads):
            last = min(head + heads, hk)
            here = slice(example, min(example + examples, b)), slice(head, last), slice(head * p.groups, last * p.groups)
            for start in range(0, n, rows):
                stop = min(start + rows, n)
                reach = min(stop + m - n, m) if p.causal else m
                if reach > 0:
                    yield Block(*here, slice(start, stop), reach)


class Scratch:
    """Memory for one block's weights, used again by the next."""

    def __init__(self, like: Tensor) -> None:
        self.flat = like.new_empty(0)

    def take(self, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape."""
        size = 1
        for side in shape:
            size *= side
        if self.flat.numel() < size:
            self.flat = self.flat.new_empty(size)
        return self.flat[:size].view(shape)


def query_rows(x: Float[Tensor, "b h n d"], block: Block, groups: int) -> Float[Tensor, "c r d"]:
    """The rows of a block with the query heads of one key head below each other."""
    piece = x[block.examples, block.heads, block.rows]
    return piece.reshape(-1, groups * block.height, x.shape[-1])


def key_rows(x: Float[Tensor, "b h m d"], block: Block) -> Float[Tensor, "c reach d"]:
    """The keys or values that a block reaches."""
    return x[block.examples, block.key_heads].flatten(0, 1)[:, : block.reach]


def cut(x: Tensor | None, block: Block) -> Tensor | None:
    """The part of something of shape (#b, #h, #n, #m) that belongs to a block."""
    if x is None:
        return None
    places = (block.examples, block.heads, block.rows, slice(block.reach))
    return x[tuple(slice(None) if size == 1 else place for size, place in zip(x.shape, places, strict=True))]


def toeplitz(table: Float[Tensor, "h r"], block: Block, n: int) -> Float[Tensor, "c rows reach"]:
    """The rows of a block from a table by offset: row i reads from entry n - 1 - i on."""
    start = n - block.rows.stop
    piece = table[block.heads, start : start + block.height - 1 + block.reach]
    return piece.unfold(-1, block.reach, 1).flip(-2)


def skewed(by_offset: Float[Tensor, "... rows w"], reach: int) -> Float[Tensor, "... rows m"]:
    """The view whose row i begins at column rows - 1 - i; no copy (Huang et al. 2018, section 3.4)."""
    *outer, rows, width = by_offset.shape
    strides = (*by_offset.stride()[:-2], width - 1, 1)
    return by_offset.as_strided((*outer, rows, reach), strides, by_offset.storage_offset() + rows - 1)


def offset_keys(p: Problem, block: Block) -> Float[Tensor, "c w d"]:
    """The rows of the table of keys that a block reads."""
    start = p.q.shape[2] - block.rows.stop
    return p.keys[block.heads, start : start + block.height - 1 + block.reach]  # type: ignore[index]


def by_head(x: Float[Tensor, "b h n d"], block: Block) -> Float[Tensor, "c r d"]:
    """The rows of a block with those of all examples of a head below each other."""
    return x[block.examples, block.heads, block.rows].transpose(0, 1).flatten(1, 2)


def masked(p: Problem, block: Block, x: Float[Tensor, "c h rows m"], value: float) -> None:
    """Write ``value`` at the pairs of a block that are not allowed."""
    (n, m), width = (p.q.shape[2], p.k.shape[2]), block.reach
    if p.causal:
        first = max(block.rows.start + m - n, 0)
        # Row i of the whole sees the columns up to i + m - n: only a block's last columns can be beyond that.
        triangle = causal_pairs(block.height, width - (block.rows.start + m - n), x.device)
        shift = max(-(block.rows.start + m - n), 0)
        x[..., first:].masked_fill_(~triangle[:, shift:], value)
    if p.key_mask is not None:
        x.masked_fill_(~p.key_mask[block.examples, None, None, :width], value)
    if p.pair_mask is not None:
        x.masked_fill_(~cut(p.pair_mask, block), value)  # type: ignore[operator]


def weigh(p: Problem, block: Block, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """A block's weights (c, h, rows, m) before the factor, and what the normaliser keeps for its derivative."""
    q, k = query_rows(p.q, block, p.groups), key_rows(p.k, block)
    flat = scratch.take(q.shape[0], q.shape[1], block.reach)
    torch.bmm(q, k.mT, out=flat)
    examples, heads = block.examples.stop - block.examples.start, block.heads.stop - block.heads.start
    logits = flat.view(examples, heads, block.height, block.reach)
    if p.keys is not None:
        by_offset = torch.bmm(by_head(p.q, block), offset_keys(p, block).mT).unflatten(1, (examples, block.height))
        logits.add_(skewed(by_offset, block.reach).transpose(0, 1))
    if p.bias is not None:
        logits.add_(cut(p.bias, block))  # type: ignore[arg-type]
    if p.offsets is not None:
        logits.add_(toeplitz(p.offsets, block, p.q.shape[2]))
    if p.normalizer.elementwise:
        weights, kept = p.normalizer.forward(logits)
        masked(p, block, weights, 0.0)
        return weights, kept
    masked(p, block, logits, torch.finfo(logits.dtype).min / 4)
    weights, kept = p.normalizer.forward(logits)
    if p.can_be_empty:
        masked(p, block, weights, 0.0)
        if kept is not weights:
            masked(p, block, kept, 0.0)
    return weights, kept


def factor(p: Problem, block: Block) -> Float[Tensor, "#c #h #rows #m"] | None:
    """What multiplies a block's weights."""
    dense = cut(p.factor, block)
    if p.factor_offsets is None:
        return dense
    table = toeplitz(p.factor_offsets, block, p.q.shape[2])[None]
    return table if dense is None else dense + table


def forward(p: Problem) -> Float[Tensor, "b h n e"]:
    """The output; queries that reach no key give 0."""
    out = p.q.new_zeros((*p.q.shape[:3], p.v.shape[3]))
    scratch = Scratch(p.q)
    for block in blocks(p):
        weights, _ = weigh(p, block, scratch)
        if (edit := factor(p, block)) is not None:
            weights = weights.mul_(edit)
        mixed = torch.bmm(weights.view(-1, p.groups * block.height, block.reach), key_rows(p.v, block))
        piece = out[block.examples, block.heads, block.rows]
        piece.copy_(mixed.view(piece.shape))
    return out
