"""Agent bias: additive position biases of both steps of agent attention, factorised into block, row and column."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.grid import Grid


class AgentBias(nn.Module):
    r"""$B[h, a, (r, c)] = \mathrm{bilinear}(T_{h,a})_{r,c} + R_{h,a,r} + C_{h,a,c}$ (Han et al. 2023, section 3.3).

    T is a block of 7 x 7 numbers that is resized to the grid; R and C are tied to the grid's sides. With a prefix (a class
    token) one more learned column a prefix token stands in front.

    Args:
        num_heads: h.
        num_agents: a.
        grid: sides of the tokens' grid, two.
        num_prefix: tokens in front of the grid.
        block: side of T.
    """

    def __init__(
        self,
        num_heads: int,
        num_agents: int,
        grid: Grid,
        *,
        num_prefix: int = 0,
        block: int = 7,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grid = grid

        def learned(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, num_agents, *shape, **place), std=0.02))

        self.block, self.rows, self.columns = learned(block, block), learned(grid[0], 1), learned(1, grid[1])
        self.prefix = learned(num_prefix) if num_prefix else None

    def forward(self) -> Float[Tensor, "1 h a n"]:
        """The bias of every agent and token, agents first."""
        block = F.interpolate(self.block, size=self.grid, mode="bilinear", align_corners=False)
        bias = (block + self.rows + self.columns).flatten(2)
        return (bias if self.prefix is None else torch.cat((self.prefix, bias), dim=-1))[None]
