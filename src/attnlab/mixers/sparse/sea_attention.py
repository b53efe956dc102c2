"""Softmax attention of each query over its own few keys, gathered in blocks of queries."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnlab.mixers.sparse.sea_selection import kept_keys, kept_pairs
from attnlab.ops.attention import attention

BLOCK, BLOCKS = 64, 16
"""The least queries that are gathered for at once, and the most blocks: each adds a gradient as large as all keys."""


def sparse_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    chosen: Bool[Tensor, "b h n c"],
    lengths: Int[Tensor, "#b #n"],
    most: int,
) -> Float[Tensor, "b h n e"]:
    """Attention over the keys of the chosen columns; a row without any gives 0.

    Time O(n most (d + e)); where ``most`` is all keys, pairs are formed, in blocks too. What a block gathers is not kept for the
    backward pass.

    Args:
        q: queries.
        k: keys, the real ones of each row first.
        v: values.
        chosen: columns kept.
        lengths: how many keys each row has.
        most: no row keeps more keys than that.
    """
    n = q.shape[2]
    size, outputs = max(BLOCK, -(-n // BLOCKS)), []
    for start in range(0, n, size):
        rows = slice(start, start + size)
        mine = lengths if lengths.shape[1] == 1 else lengths[:, rows]
        block = (q[:, :, rows], k, v, chosen[:, :, rows], mine, most)
        if n <= size or not torch.is_grad_enabled():
            outputs.append(_block(*block))
        else:
            outputs.append(checkpoint(_block, *block, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outputs, dim=2)


def _block(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    chosen: Bool[Tensor, "b h n c"],
    lengths: Int[Tensor, "#b #n"],
    most: int,
) -> Float[Tensor, "b h n e"]:
    num_keys = k.shape[2]
    if most >= num_keys:
        return attention(q, k, v, pair_mask=kept_pairs(chosen, lengths, num_keys))
    ranks, taken = kept_keys(chosen, lengths, most)
    heads = torch.arange(k.shape[0] * k.shape[1], device=k.device).view(*k.shape[:2], 1, 1)
    index = (heads * num_keys + ranks.masked_fill(~taken, 0)).flatten()
    gathered = [x.flatten(0, 2).index_select(0, index).view(-1, 1, most, x.shape[3]) for x in (k, v)]
    out = attention(q.reshape(-1, 1, 1, q.shape[3]), *gathered, key_mask=taken.flatten(0, 2))
    return out.view(*q.shape[:3], v.shape[3])
