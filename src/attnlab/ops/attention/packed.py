"""Attention over sequences of different lengths without padding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.ops.attention import attention
from attnlab.ops.executions import Counts, execution


@execution("packed", family="varlen", paper="byte-transformer")
def packed(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    lengths: Int[Tensor, "b"] | None = None,
    counts: Counts | None = None,
) -> Float[Tensor, "b h n e"]:
    """Each example against exactly its own keys (Zhai et al. 2022, ByteTransformer, section III).

    The work is the sum of the examples' own, not that of the longest times their number. Whole layers run without padding
    through `attnlab.pack` and `attnlab.Mixer.packed`; this is their attention alone. Self-attention's padded queries give 0.
    """
    real = [k.shape[2]] * len(q) if lengths is None else lengths.tolist()
    same = q.shape[2] == k.shape[2]
    outputs = []
    for example, length in enumerate(real):
        rows = length if same and lengths is not None else q.shape[2]
        out = q.new_zeros(1, q.shape[1], q.shape[2], v.shape[3])
        if length and rows:
            here = slice(example, example + 1)
            found = attention(q[here, :, :rows], k[here, :, :length], v[here, :, :length])
            out = torch.cat((found, out[:, :, rows:]), dim=2)
        outputs.append(out)
        if counts is not None:
            counts.reads += k.shape[1] * length * (k.shape[3] + v.shape[3])
            counts.exponentials += q.shape[1] * rows * length
            counts.divisions += q.shape[1] * rows * v.shape[3]
            counts.live = max(counts.live, q.shape[1] * rows * length)
    if counts is not None:
        counts.passes += 1
    return torch.cat(outputs)
