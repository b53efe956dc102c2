"""Softmax attention of each query over its own few keys, gathered in blocks of queries in both directions."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.mixers.sparse.sea_selection import kept_keys, kept_pairs
from attnlab.ops.attention import attention
from attnlab.ops.chunks import common_dtype, full_precision

BLOCK = 64
"""Queries that are gathered for at once."""


def sparse_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    chosen: Bool[Tensor, "b h n c"],
    lengths: Int[Tensor, "#b #n"],
    most: int,
) -> Float[Tensor, "b h n e"]:
    """Attention over the keys of the chosen columns; a row without any gives 0.

    Time and memory O(n most (d + e)); where ``most`` is all keys, pairs are formed, in blocks too.

    Args:
        q: queries.
        k: keys, the real ones of each row first.
        v: values.
        chosen: columns kept.
        lengths: how many keys each row has.
        most: no row keeps more keys than that.
    """
    if k.shape[2] <= BLOCK:
        return attention(q, k, v, pair_mask=kept_pairs(chosen, lengths, k.shape[2]))
    q, k, v = common_dtype(q=q, k=k, v=v)
    out: Tensor = _Blocks.apply(q, k, v, chosen, lengths, most)
    return out


class _Blocks(torch.autograd.Function):
    """Blocks of queries one after the other, computed again in the backward pass: neither keeps what is gathered."""

    @staticmethod
    @full_precision
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, lengths: Tensor, most: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, chosen, lengths)
        ctx.most = most
        parts = [_Rows(rows, k, chosen, lengths, most).attend(q[:, :, rows], k, v)[0] for rows in _blocks(q)]
        return torch.cat(parts, dim=2)

    @staticmethod
    @full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, chosen, lengths = ctx.saved_tensors
        to_q, to_k, to_v = (x.new_zeros(x.shape) for x in (q, k, v))  # contiguous, whatever these are
        for rows in _blocks(q):
            block = _Rows(rows, k, chosen, lengths, ctx.most)
            with torch.enable_grad():
                mine = q[:, :, rows].detach().requires_grad_()
                out, leaves = block.attend(mine, k.detach(), v.detach())
            grads = torch.autograd.grad(out, (mine, *leaves), grad[:, :, rows].contiguous())
            to_q[:, :, rows] = grads[0]
            block.add(to_k, grads[1])
            block.add(to_v, grads[2])
        return to_q, to_k, to_v, None, None, None


def _blocks(q: Tensor) -> list[slice]:
    return [slice(start, min(start + BLOCK, q.shape[2])) for start in range(0, q.shape[2], BLOCK)]


class _Rows:
    """A block of queries: which keys its rows keep, gathered if that is less than all."""

    def __init__(self, rows: slice, k: Tensor, chosen: Tensor, lengths: Tensor, most: int) -> None:
        mine = lengths if lengths.shape[1] == 1 else lengths[:, rows]
        chosen, num_keys = chosen[:, :, rows], k.shape[2]
        self.index: Tensor | None = None
        if most >= num_keys:
            self.allowed = kept_pairs(chosen, mine, num_keys)
            return
        ranks, taken = kept_keys(chosen, mine, most)
        heads = torch.arange(k.shape[0] * k.shape[1], device=k.device).view(*k.shape[:2], 1, 1)
        self.index = (heads * num_keys + ranks.masked_fill(~taken, 0)).flatten()
        self.allowed = taken.flatten(0, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The outputs, and the keys and values that they were computed from."""
        wanted = q.requires_grad
        if self.index is None:
            leaves = (k.requires_grad_(wanted), v.requires_grad_(wanted)) if wanted else (k, v)
            return attention(q, *leaves, pair_mask=self.allowed), leaves
        gathered = [x.flatten(0, 2)[self.index].unflatten(0, self.allowed.shape).unsqueeze(1) for x in (k, v)]
        leaves = (gathered[0].requires_grad_(wanted), gathered[1].requires_grad_(wanted)) if wanted else tuple(gathered)
        out = attention(q.flatten(0, 2)[:, None, None], *leaves, key_mask=self.allowed)
        return out[:, 0, 0].unflatten(0, q.shape[:3]), leaves

    def add(self, total: Tensor, grad: Tensor) -> None:
        """Add the gradient of what was gathered to that of all."""
        if self.index is None:
            total += grad
        else:
            total.flatten(0, 2).index_add_(0, self.index, grad.flatten(0, 2))
