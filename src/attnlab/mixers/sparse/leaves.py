"""Causal attention inside consecutive pieces of a sequence."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.partial_attention import partial_attention
from attnlab.ops.partials import Partial


def causal_leaves(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n e"],
    size: int,
    mask: Bool[Tensor, "b n"] | None = None,
) -> Partial:
    """Exact causal attention in each leaf.

    Args:
        q: queries.
        k: keys.
        v: values.
        size: tokens of a leaf; the last one may be shorter.
        mask: which keys may be used.
    """
    n = q.shape[2]
    whole = n - n % size
    found = []
    for start, stop, length in ((0, whole, size), (whole, n, n - whole)):
        if start < stop:
            real = None if mask is None else mask[:, start:stop]
            found.append(_of_length(q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], real, length))
    return found[0] if len(found) == 1 else Partial(*(torch.cat(part, dim=2) for part in zip(*found, strict=True)))


def _of_length(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, length: int) -> Partial:
    """Leaves of the same length, which are examples of a batch."""
    b = len(q)
    q, k, v = (x.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    mask = None if mask is None else mask.unflatten(1, (-1, length)).flatten(0, 1)
    found = partial_attention(q, k, v, causal=True, key_mask=mask)
    return Partial(*(x.unflatten(0, (b, -1)).transpose(1, 2).flatten(2, 3) for x in found))
