"""Group normalisation with one group, over the channels and real tokens of an example together."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.masks import zero_masked


def group_norm(
    x: Float[Tensor, "b n c"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    mask: Bool[Tensor, "b n"] | None,
    eps: float = 1e-5,
) -> Float[Tensor, "b n c"]:
    r"""$w_c\,(x_{ic} - \mu) / \sqrt{\sigma^2 + \epsilon} + b_c$ with $\mu, \sigma^2$ over all real tokens and channels.

    Masked tokens are not in the statistics, neither is their number, and give 0. Every token reads all others, so that this is
    for mixers that are neither causal nor take a pair_mask.

    Args:
        x: tokens.
        weight: w, (c,).
        bias: b, (c,).
        mask: True marks a real token.
        eps: $\epsilon$.
    """
    if mask is None:
        return F.group_norm(x.transpose(1, 2), 1, weight, bias, eps).transpose(1, 2)
    x = zero_masked(x, mask)
    count = mask.sum(1).clamp(min=1).to(x.dtype)[:, None, None] * x.shape[2]
    centred = zero_masked(x - x.sum((1, 2), keepdim=True) / count, mask)
    variance = centred.square().sum((1, 2), keepdim=True) / count
    return zero_masked(centred * (variance + eps).rsqrt() * weight + bias, mask)
