"""How the queries of a sequence are pooled into agents."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.mixers.parts.segments import segment_means


def pool_sequence(
    x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, count: int
) -> tuple[Float[Tensor, "b a c"], Bool[Tensor, "b a"] | None]:
    """Adaptive average pooling of the real tokens to ``count`` agents, and which agents have any token."""
    if mask is None:
        return F.adaptive_avg_pool1d(x.transpose(1, 2), count).transpose(1, 2), None
    means = segment_means(mask, count, x.dtype)
    return means @ x, means.any(dim=-1)
