"""Families of functions of one variable, for layers that learn a function on each edge (Kolmogorov-Arnold networks).

All act element by element; parameters broadcast against x. Wavelets are mother wavelets: shift, scale and weight them outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def safe_pade(
    x: Float[Tensor, "*s"], numerator: Float[Tensor, "p *s2"], denominator: Float[Tensor, "r *s2"]
) -> Float[Tensor, "*s3"]:
    r"""$(a_0 + a_1 x + \dots + a_m x^m) / (1 + |b_1 x + \dots + b_n x^n|)$, which has no pole.

    Args:
        x: where.
        numerator: $a_0, \dots, a_m$ along the first dimension, the rest broadcasts with x.
        denominator: $b_1, \dots, b_n$, likewise.
    """
    above, below = numerator[-1], denominator[-1]
    for a in reversed(numerator[:-1].unbind()):
        above = above * x + a
    for b in reversed(denominator[:-1].unbind()):
        below = below * x + b
    return above / (1.0 + (below * x).abs())


def mexican_hat(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    r"""$\frac{2}{\sqrt3\,\pi^{1/4}}\,(x^2 - 1)\,e^{-x^2/2}$."""
    square = x.square()
    return 2.0 / (math.sqrt(3.0) * math.pi**0.25) * (square - 1.0) * torch.exp(-0.5 * square)


def morlet(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    r"""$\cos(5x)\,e^{-x^2/2}$."""
    return torch.cos(5.0 * x) * torch.exp(-0.5 * x.square())


def derivative_of_gaussian(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    r"""$-\frac{d}{dx} e^{-x^2/2} = x\,e^{-x^2/2}$."""
    return x * torch.exp(-0.5 * x.square())


def meyer(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    r"""$\sin(\pi |x|)\,m(|x|)$, m = 1 below 1/2, $\cos(\frac{\pi}{2}\,\nu(2t - 1))$ up to 1, and 0 from there on.

    $\nu(t) = t^4 (35 - 84 t + 70 t^2 - 20 t^3)$ climbs smoothly from 0 to 1.
    """
    size = x.abs()
    t = (2.0 * size - 1.0).clamp(0.0, 1.0)
    climb = t**4 * (35.0 - 84.0 * t + 70.0 * t**2 - 20.0 * t**3)
    return torch.sin(math.pi * size) * torch.cos(0.5 * math.pi * climb)


def shannon(x: Float[Tensor, "*s m"]) -> Float[Tensor, "*s m"]:
    r"""$\frac{\sin x}{x}$ times a symmetric Hamming window over the last dimension."""
    window = torch.hamming_window(x.shape[-1], periodic=False, device=x.device, dtype=x.dtype)
    return torch.sinc(x / math.pi) * window


WAVELETS: dict[str, Callable[[Tensor], Tensor]] = {
    "mexican_hat": mexican_hat,
    "morlet": morlet,
    "derivative_of_gaussian": derivative_of_gaussian,
    "meyer": meyer,
    "shannon": shannon,
}
"""The wavelets by name."""


def project_to_simplex(rows: Float[Tensor, "*s m"], allowed: Tensor | None = None) -> Float[Tensor, "*s m"]:
    r"""The nearest point of the probability simplex: $\max(y_j - \lambda, 0)$ with the $\lambda$ for which it sums to one.

    With y sorted from the largest, $\lambda = (\sum_{j \le \rho} y_{(j)} - 1) / \rho$ and $\rho$ the last i with
    $y_{(i)} > (\sum_{j \le i} y_{(j)} - 1) / i$.

    Args:
        rows: y, (..., m).
        allowed: True where an entry may be more than 0, broadcastable to ``rows``; a row without any becomes 0.
    """
    if allowed is not None:
        # the support lies within 1 of the largest entry: what is 2 below it can neither be in it nor move lambda
        largest = rows.masked_fill(~allowed, float("-inf")).amax(dim=-1, keepdim=True)
        rows = torch.where(allowed, rows, largest.masked_fill(largest == float("-inf"), 0.0).detach() - 2.0)
    ordered = rows.sort(dim=-1, descending=True).values
    count = torch.arange(1, rows.shape[-1] + 1, device=rows.device, dtype=rows.dtype)
    excess = (ordered.cumsum(dim=-1) - 1.0) / count
    support = (ordered > excess).sum(dim=-1, keepdim=True).clamp(min=1)  # 0 only where rounding or NaN hide the largest
    points = (rows - excess.gather(-1, support - 1)).clamp(min=0.0)
    return points if allowed is None else points.masked_fill(~allowed, 0.0)
