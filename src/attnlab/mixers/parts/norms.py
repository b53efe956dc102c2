"""Norms without statistics over tokens, so that padding and the future cannot leak through them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def l2_normalize(x: Float[Tensor, "*s d"], eps: float = 1e-6) -> Float[Tensor, "*s d"]:
    r"""$x / \sqrt{\sum_d x_d^2 + \epsilon}$ over the last dimension."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)


def sum_normalize(x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
    r"""$x / \sum_d x_d$ over the last dimension; 0 where the sum is 0."""
    total = x.sum(dim=-1, keepdim=True)
    return x / total.masked_fill(total == 0, 1.0)


def simple_rms_norm(x: Float[Tensor, "*s d"], eps: float = 1e-6) -> Float[Tensor, "*s d"]:
    r"""$x / \sqrt{\mathrm{mean}_d x_d^2 + \epsilon}$ over the last dimension, no weights."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)
