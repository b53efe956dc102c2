"""A two-layer perceptron for each head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class HeadMLP(nn.Module):
    r"""$W_2^h\, \mathrm{SiLU}(N(W_1^h z + b_1^h)) + b_2^h$ for head h, N an RMSNorm or nothing.

    Args:
        num_heads: heads, each with its own weights.
        width: of a head's input.
        hidden: inner width.
        out_width: of a head's output.
        norm: whether N is an RMSNorm with a weight a head, $\epsilon = 10^{-6}$.
    """

    def __init__(
        self,
        num_heads: int,
        width: int,
        hidden: int,
        out_width: int,
        *,
        norm: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.up = nn.Parameter(torch.empty(num_heads, width, hidden, **place).uniform_(-(width**-0.5), width**-0.5))
        self.up_bias = nn.Parameter(torch.zeros(num_heads, 1, hidden, **place))
        self.norm = nn.Parameter(torch.ones(num_heads, 1, hidden, **place)) if norm else None
        self.down = nn.Parameter(torch.empty(num_heads, hidden, out_width, **place).uniform_(-(hidden**-0.5), hidden**-0.5))
        self.down_bias = nn.Parameter(torch.zeros(num_heads, 1, out_width, **place))

    def forward(self, z: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n e"]:
        """Each head through its layers."""
        y = z @ self.up + self.up_bias
        if self.norm is not None:
            y = F.rms_norm(y, y.shape[-1:], eps=1e-6) * self.norm
        return F.silu(y) @ self.down + self.down_bias
