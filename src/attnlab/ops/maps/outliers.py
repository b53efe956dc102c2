"""How far the largest activations stand out: what makes a network hard to quantise."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.core.masks import check_mask, zero_masked


def inf_norm(x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, " b"]:
    r"""$\max |x|$ of each example (Bondarenko et al. 2023), (b,).

    Args:
        x: activations (b, n, c), such as what attention adds up to with its residual.
        mask: (b, n), True marks a real token; an example without any has 0.
    """
    check_mask("mask", mask, tuple(x.shape[:2]))
    return zero_masked(x, mask).abs().flatten(1).amax(dim=1)


def kurtosis(x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, " b"]:
    r"""$\mathrm{mean}\big((x - \mu)^4\big) / \sigma^4$ over all entries of each example (Bondarenko et al. 2023), (b,).

    3 for a normal distribution, more for tails that are heavier; 0 for an example whose entries are all alike.

    Args:
        x: activations (b, n, c).
        mask: (b, n), True marks a real token.
    """
    check_mask("mask", mask, tuple(x.shape[:2]))
    real = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
    count = real.sum(dim=1).clamp(min=1) * x.shape[2]
    mean = zero_masked(x, mask).sum(dim=(1, 2)) / count
    squares = zero_masked(x - mean[:, None, None], real).square()
    variance = squares.sum(dim=(1, 2)) / count
    alike = variance == 0
    fourth = squares.square().sum(dim=(1, 2)) / count
    return (fourth / variance.masked_fill(alike, 1.0).square()).masked_fill(alike, 0.0)
