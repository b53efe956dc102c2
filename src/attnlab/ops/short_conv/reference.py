"""The short convolution as a sum over taps: the oracle."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def convolve(
    padded: Float[Tensor, "b p c"], weight: Float[Tensor, "c w"], bias: Float[Tensor, "c"] | None
) -> Float[Tensor, "b n c"]:
    r"""$y_t = \beta + \sum_{k=0}^{w-1} W_k \odot x_{t+k}$ for padded inputs x of n + w - 1 tokens."""
    taps = weight.shape[1]
    tokens = padded.shape[1] - taps + 1
    y = torch.stack([padded[:, k : k + tokens] * weight[:, k] for k in range(taps)]).sum(0)
    return y if bias is None else y + bias
