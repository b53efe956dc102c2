"""Random features whose products estimate the exponential kernel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


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
    less = (x.square().sum(dim=-1, keepdim=True) + math.log(len(directions))) / 2
    return (x @ directions.mT - less).exp()


def trigonometric_features(x: Float[Tensor, "*s d"], directions: Float[Tensor, "f d"]) -> Float[Tensor, "*s f2"]:
    r"""$e^{\lVert x\rVert^2/2}\, f^{-1/2}\, [\sin w_1^\top x, \dots, \cos w_f^\top x]$: products may be negative."""
    half = x.square().sum(dim=-1, keepdim=True) / 2
    angles = x @ directions.mT
    return (half.exp() * len(directions) ** -0.5) * torch.cat((angles.sin(), angles.cos()), dim=-1)


RANDOM_MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "positive": positive_features,
    "trigonometric": trigonometric_features,
}


class RandomFeatures(nn.Module):
    r"""Features of $\sqrt{s}\,x$ along random directions: products estimate $e^{s\,x^\top y}$ (Choromanski et al. 2020, lemma 1).

    The directions are the buffer ``directions`` (f, d), which is saved, and may be set; `redraw` draws others.

    Args:
        kind: "positive" (f features) or "trigonometric" (2 f, whose products may be negative).
        width: d.
        num_features: f.
        scale: s.
        generator: draws the directions.

    Raises:
        ValueError: for an unknown kind, or less than one feature.
    """

    directions: Tensor

    def __init__(
        self,
        kind: str,
        width: int,
        num_features: int,
        *,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in RANDOM_MAPS:
            raise ValueError(f"kind: expected one of {sorted(RANDOM_MAPS)}, got {kind!r}")
        if num_features < 1:
            raise ValueError(f"num_features: expected at least 1, got {num_features}")
        self.kind, self.scale = kind, scale
        drawn = orthogonal_directions(num_features, width, generator=generator, device=device, dtype=dtype)
        self.register_buffer("directions", drawn)

    @property
    def width(self) -> int:
        """Width of the features."""
        return len(self.directions) * (2 if self.kind == "trigonometric" else 1)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Replace the directions by new ones."""
        like = self.directions
        like.copy_(orthogonal_directions(*like.shape, generator=generator, device=like.device, dtype=like.dtype))

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s f"]:
        """The features."""
        return RANDOM_MAPS[self.kind](x * self.scale**0.5, self.directions.to(x.dtype))
