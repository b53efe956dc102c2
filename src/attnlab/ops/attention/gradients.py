"""The backward pass of dense attention in blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.attention.blocks import (
    Block,
    Problem,
    Scratch,
    blocks,
    by_head,
    cut,
    factor,
    key_rows,
    masked,
    offset_keys,
    query_rows,
    skewed,
    weigh,
)


class Gradients(NamedTuple):
    """Gradients of the tensors of a `Problem` of the same names; None where there is no such tensor or it needs none."""

    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b hk m d"]
    v: Float[Tensor, "b hk m e"]
    bias: Float[Tensor, "#b #h #n #m"] | None
    offsets: Float[Tensor, "h r"] | None
    keys: Float[Tensor, "h r d"] | None
    factor: Float[Tensor, "#b #h #n #m"] | None
    factor_offsets: Float[Tensor, "h r"] | None


def backward(p: Problem, grad_out: Float[Tensor, "b h n e"], needed: list[bool]) -> Gradients:
    """Gradients of what ``needed`` names, in the order of `Gradients`; those of q, k and v always."""
    tensors = (p.q, p.k, p.v, p.bias, p.offsets, p.keys, p.factor, p.factor_offsets)
    wanted = zip(tensors, (True, True, True, *needed[3:]), strict=True)
    like = {"memory_format": torch.contiguous_format}
    grads = Gradients(*(torch.zeros_like(x, **like) if x is not None and need else None for x, need in wanted))  # type: ignore[arg-type]
    scratch, second = Scratch(p.q), Scratch(p.q)
    for block in blocks(p):
        _block(p, block, grad_out, grads, scratch, second)
    return grads


def _block(p: Problem, block: Block, grad_out: Tensor, grads: Gradients, scratch: Scratch, second: Scratch) -> None:
    weights, kept = weigh(p, block, scratch)
    rows = (-1, p.groups * block.height, block.reach)
    above = query_rows(grad_out, block, p.groups)
    grad = second.take(above.shape[0], above.shape[1], block.reach)
    torch.bmm(above, key_rows(p.v, block).mT, out=grad)
    grad = grad.view(weights.shape)
    edit = factor(p, block)
    used = weights if edit is None else weights * edit
    key_rows(grads.v, block).baddbmm_(used.view(rows).mT, above)
    if edit is not None:
        _to_factor(p, block, grad * weights, grads)
        grad.mul_(edit)
    grad = p.normalizer.backward(kept, grad)
    if p.normalizer.elementwise:
        masked(p, block, grad, 0.0)
    _to_terms(p, block, grad, grads)
    down = torch.bmm(grad.view(rows), key_rows(p.k, block))
    piece = grads.q[block.examples, block.heads, block.rows]
    piece.add_(down.view(piece.shape))
    key_rows(grads.k, block).baddbmm_(grad.view(rows).mT, query_rows(p.q, block, p.groups))


def _to_factor(p: Problem, block: Block, grad: Float[Tensor, "c h rows m"], grads: Gradients) -> None:
    if grads.factor is not None:
        _into(grads.factor, block, grad)
    if grads.factor_offsets is not None:
        _into_table(grads.factor_offsets, block, p.q.shape[2], grad)


def _to_terms(p: Problem, block: Block, grad: Float[Tensor, "c h rows m"], grads: Gradients) -> None:
    """Gradients of the logits' terms, that of q through the keys by offset included."""
    if grads.bias is not None:
        _into(grads.bias, block, grad)
    if grads.offsets is not None:
        _into_table(grads.offsets, block, p.q.shape[2], grad)
    if p.keys is None:
        return
    by_offset = _by_offset(grad.transpose(0, 1)).flatten(1, 2)
    piece = grads.q[block.examples, block.heads, block.rows]
    piece.add_(torch.bmm(by_offset, offset_keys(p, block)).view(piece.transpose(0, 1).shape).transpose(0, 1))
    if grads.keys is not None:
        start = p.q.shape[2] - block.rows.stop
        table = grads.keys[block.heads, start : start + by_offset.shape[2]]
        table.baddbmm_(by_offset.mT, by_head(p.q, block))


def _by_offset(grad: Float[Tensor, "... rows m"]) -> Float[Tensor, "... rows w"]:
    """Entry (i, j) at column rows - 1 - i + j: the transpose of `skewed`."""
    *outer, rows, reach = grad.shape
    by_offset = grad.new_zeros((*outer, rows, rows + reach - 1))
    skewed(by_offset, reach).copy_(grad)
    return by_offset


def _into(total: Tensor, block: Block, grad: Float[Tensor, "c h rows m"]) -> None:
    """Add to a gradient of shape (#b, #h, #n, #m), summed where that is broadcast."""
    piece = cut(total, block)
    if piece is not None:
        piece.add_(grad.sum_to_size(piece.shape))


def _into_table(total: Float[Tensor, "h r"], block: Block, n: int, grad: Float[Tensor, "c h rows m"]) -> None:
    """Add to a table by offset the sums along the diagonals."""
    sums = _by_offset(grad.sum(0)).sum(-2)
    start = n - block.rows.stop
    total[block.heads, start : start + sums.shape[-1]].add_(sums)
