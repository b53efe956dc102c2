"""Where agents come from: pooled queries, learned tokens, or a module of the caller's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.mixers.parts.grid_pooling import pool_grid
from attnlab.mixers.parts.segments import segment_means


class PooledAgents(nn.Module):
    """Means of the queries: over adaptive cells of a 2-D grid, or over adaptive segments of a sequence; of real tokens alone.

    Args:
        count: agents; on a 2-D grid a square number.

    Raises:
        ValueError: on a grid, for another number.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(
        self, q: Float[Tensor, "b h n d"], mask: Bool[Tensor, "b n"] | None, grid: Grid | None
    ) -> tuple[Float[Tensor, "b h a d"], Bool[Tensor, "b a"] | None]:
        """The agents of every head, and which of them stand for any token."""
        tokens = rearrange(q, "b h n d -> b n (h d)")
        if grid is not None and len(grid) == 2:
            side = math.isqrt(self.count)
            if side * side != self.count:
                raise ValueError(f"num_agents: expected a square number on a 2-D grid, got {self.count}")
            pooled, alive = pool_grid(tokens, mask, grid, (side, side))
        else:
            pooled, alive = pool_sequence(tokens, mask, self.count)
        return rearrange(pooled, "b a (h d) -> b h a d", h=q.shape[1]), alive


class LearnedAgents(nn.Module):
    """The same agents for every input.

    Args:
        num_heads: heads.
        count: agents of each.
        head_dim: their width.
    """

    def __init__(
        self,
        num_heads: int,
        count: int,
        head_dim: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        empty = torch.empty(num_heads, count, head_dim, device=device, dtype=dtype)
        self.tokens = nn.Parameter(nn.init.trunc_normal_(empty, std=0.02))

    def forward(
        self, q: Float[Tensor, "b h n d"], mask: Bool[Tensor, "b n"] | None, grid: Grid | None
    ) -> tuple[Float[Tensor, "b h a d"], Bool[Tensor, "b a"] | None]:
        """The agents of every head; all of them stand for something."""
        return self.tokens.to(q.dtype).expand(len(q), -1, -1, -1), None


def pool_sequence(
    x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, count: int
) -> tuple[Float[Tensor, "b a c"], Bool[Tensor, "b a"] | None]:
    """Adaptive average pooling of the real tokens to ``count`` agents, and which agents have any token."""
    if mask is None:
        return F.adaptive_avg_pool1d(x.transpose(1, 2), count).transpose(1, 2), None
    means = segment_means(mask, count, x.dtype)
    return means @ x, means.any(dim=-1)
