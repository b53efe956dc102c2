"""Absolute position: a vector a place, added to queries and keys."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.positions.base import Position, positions


@positions.register("learned", family="absolute")
class LearnedPosition(Position):
    r"""A learned vector a position (Gehring et al. 2017), the same for all heads: $q_i + p_i$ and $k_j + p_j$.

    Args:
        num_heads: heads of the attention.
        head_dim: width of a query.
        max_length: positions of the table.
        std: standard deviation of the table at first.

    Raises:
        ValueError: for a length below 1; in use, for a token beyond the table.

    Differs from the usual form, which adds to the tokens: values carry no position here, and each mixer has its own table.
    """

    skips_padding = True

    def __init__(self, num_heads: int, head_dim: int, *, max_length: int = 1024, std: float = 0.02) -> None:
        super().__init__(num_heads, head_dim)
        if max_length < 1:
            raise ValueError(f"max_length: expected at least 1, got {max_length}")
        self.table = nn.Parameter(torch.randn(max_length, head_dim) * std)

    def encode(self, x: Float[Tensor, "b h n d"], index: Int[Tensor, "#b n"]) -> Float[Tensor, "b h n d"]:
        """``x`` with the vectors of its positions added."""
        if not torch.compiler.is_compiling() and int(index.max()) >= len(self.table):
            raise ValueError(f"x: position 'learned' has max_length={len(self.table)}, got a token at {int(index.max())}")
        return x + self.table.to(x.dtype)[index].unsqueeze(1)


@positions.register("sinusoidal", family="absolute")
class SinusoidalPosition(Position):
    r"""Sines and cosines of the position (Vaswani et al. 2017, section 3.5), added to queries and keys of every head.

    $$p_{i,2t} = \sin(i\,\mathrm{base}^{-2t/d}), \qquad p_{i,2t+1} = \cos(i\,\mathrm{base}^{-2t/d})$$

    Args:
        num_heads: heads of the attention.
        head_dim: width of a query.
        base: wavelengths reach from 2 pi to 2 pi base.
        scale: factor of the vectors; by default head_dim ** -0.5, the size of a key's entry.

    Differs from the paper: added to queries and keys, not to the tokens, so that values carry no position.
    """

    skips_padding = True
    rates: Tensor

    def __init__(self, num_heads: int, head_dim: int, *, base: float = 10000.0, scale: float | None = None) -> None:
        super().__init__(num_heads, head_dim)
        self.scale = head_dim**-0.5 if scale is None else scale
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        self.register_buffer("rates", torch.exp(-math.log(base) * exponents).float(), persistent=False)

    def encode(self, x: Float[Tensor, "b h n d"], index: Int[Tensor, "#b n"]) -> Float[Tensor, "b h n d"]:
        """``x`` with the waves at its positions added."""
        angles = index.unsqueeze(-1).to(self.rates.dtype) * self.rates
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., : x.shape[-1]]
        return x + self.scale * waves.to(x.dtype).unsqueeze(1)
