"""Attention whose rule depends on how long a sequence is, on a batch that is padded on the right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Queries, keys, values (b, h, n, d) and the mask (b, n) of sequences of one length, to outputs (b, h, n, e)."""


def each_length(
    attend: Attend,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n e"],
    mask: Bool[Tensor, "b n"],
) -> Float[Tensor, "b h n e"]:
    """``attend`` on the examples of each length by themselves, so that padding on the right is not part of the sequence.

    The length of an example is the place behind its last real token; outputs beyond it are 0.
    """
    n = q.shape[2]
    if mask.is_meta:  # shapes alone
        return attend(q, k, v, mask)
    lengths = (mask.long() * torch.arange(1, n + 1, device=mask.device)).amax(1)
    found = lengths.unique().tolist()
    if found == [n]:
        return attend(q, k, v, mask)
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for length in found:
        rows = (lengths == length).nonzero().squeeze(1)
        if length:
            part = attend(q[rows, :, :length], k[rows, :, :length], v[rows, :, :length], mask[rows, :length])
            out = out.index_put((rows,), torch.nn.functional.pad(part, (0, 0, 0, n - length)))
    return out
