"""Linearised relative position encoding: features that turn a product into one of relative position."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class LRPE(nn.Module):
    r"""$x_n \mapsto [x_n \cos(n\theta),\; x_n \sin(n\theta)]$ with learned $\theta$ (TransNormerLLM, section 3.1).

    The product of two such features is $\sum_t q_t k_t \cos(\theta_t (i - j))$; the width doubles.

    Args:
        num_heads: h.
        head_dim: d; channel t of all h d starts at $10000^{-2t/(hd)}$.
    """

    def __init__(
        self, num_heads: int, head_dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        exponents = torch.arange(num_heads * head_dim, device=device) * (-2.0 / (num_heads * head_dim))
        self.theta = nn.Parameter((10000.0**exponents).view(num_heads, 1, head_dim).to(dtype))

    def forward(self, x: Float[Tensor, "b h n d"], index: Int[Tensor, "b n"]) -> Float[Tensor, "b h n d2"]:
        """The features; ``index`` is each token's position."""
        angles = index[:, None, :, None].to(self.theta.dtype) * self.theta
        return torch.cat((x * angles.cos(), x * angles.sin()), dim=-1)
