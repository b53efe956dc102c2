"""Rotary position: pairs of channels turned by an angle that grows with the position."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.positions.base import Position, positions


def rotate(
    x: Float[Tensor, "b h n d"], angles: Float[Tensor, "#b n p"], *, interleaved: bool = False
) -> Float[Tensor, "b h n d"]:
    r"""Turn channel pairs: $(x_1, x_2) \mapsto (x_1 \cos\theta - x_2 \sin\theta,\; x_2 \cos\theta + x_1 \sin\theta)$.

    Args:
        x: (b, h, n, d); the first 2 p channels are turned, the rest passes.
        angles: (b or 1, n, p), one angle a pair.
        interleaved: pairs are (0, 1), (2, 3), ... instead of (0, p), (1, p + 1), ...
    """
    pairs = angles.shape[-1]
    cos, sin = angles.cos().unsqueeze(1).to(x.dtype), angles.sin().unsqueeze(1).to(x.dtype)
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.split(pairs, dim=-1)
    out = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(out, dim=-1).flatten(-2) if interleaved else torch.cat(out, dim=-1)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


@positions.register("rotary", family="multiplicative")
class Rotary(Position):
    r"""Rotary position embedding (Su et al. 2021, equation 34).

    Pair t of d / 2 is turned by $n\,\mathrm{base}^{-2t/d}$ at position n, so that $q_i^\top k_j$ depends on i - j alone.

    Args:
        num_heads: heads of the attention; all turn alike.
        head_dim: width of a query; 2 floor(fraction * head_dim / 2) channels are turned.
        base: wavelengths reach from 2 pi to 2 pi base.
        fraction: share of the channels that is turned.
        interleaved: how channels pair up, see `rotate`.
    """

    frequencies: Tensor

    def __init__(
        self, num_heads: int, head_dim: int, *, base: float = 10000.0, fraction: float = 1.0, interleaved: bool = False
    ) -> None:
        super().__init__(num_heads, head_dim)
        turned = 2 * int(fraction * head_dim / 2)
        if not 0.0 < fraction <= 1.0 or turned < 2:
            raise ValueError(f"fraction: expected at least one pair of the {head_dim} channels, got {fraction}")
        exponents = torch.arange(0, turned, 2, dtype=torch.float64) / turned
        self.register_buffer("frequencies", (base**-exponents).float(), persistent=False)
        self.interleaved = interleaved

    def encode(self, x: Float[Tensor, "b h n d"], index: Int[Tensor, "#b n"]) -> Float[Tensor, "b h n d"]:
        """``x`` turned by the angles of its positions."""
        # Angles in float32 at least: in bfloat16 positions beyond 256 would collide.
        angles = index.unsqueeze(-1).to(self.frequencies.dtype) * self.frequencies
        return rotate(x, angles, interleaved=self.interleaved)
