"""Random features whose products estimate the exponential kernel."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def orthogonal_directions(
    count: int,
    width: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "f d"]:
    """Directions that are each N(0, I) and orthogonal to each other in blocks of ``width`` (Choromanski et al. 2020)."""
    drawn_on = device if generator is None else generator.device
    blocks = -(-count // width)
    bases, sides = torch.linalg.qr(torch.randn(blocks, width, width, generator=generator, device=drawn_on))
    bases = bases * sides.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # else their directions would not be uniform
    lengths = torch.randn(count, width, generator=generator, device=drawn_on).norm(dim=-1, keepdim=True)
    return (bases.mT.flatten(0, 1)[:count] * lengths).to(device=device, dtype=dtype)


def positive_features(x: Float[Tensor, "*s d"], directions: Float[Tensor, "f d"]) -> Float[Tensor, "*s f"]:
    r"""$e^{-\lVert x\rVert^2/2}\, f^{-1/2}\, [e^{w_1^\top x}, \dots, e^{w_f^\top x}]$: products estimate $e^{x^\top y}$."""
    half = x.square().sum(dim=-1, keepdim=True) / 2
    return (x @ directions.mT - half).exp() * len(directions) ** -0.5


def trigonometric_features(x: Float[Tensor, "*s d"], directions: Float[Tensor, "f d"]) -> Float[Tensor, "*s f2"]:
    r"""$e^{\lVert x\rVert^2/2}\, f^{-1/2}\, [\sin w_1^\top x, \dots, \cos w_f^\top x]$: products may be negative."""
    half = x.square().sum(dim=-1, keepdim=True) / 2
    angles = x @ directions.mT
    return half.exp() * torch.cat((angles.sin(), angles.cos()), dim=-1) * len(directions) ** -0.5
