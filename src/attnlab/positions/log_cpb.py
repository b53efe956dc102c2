"""Continuous position bias: a small MLP on log-spaced offsets of a grid."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.positions.base import Position, positions


def log_offsets(grid: Grid) -> Float[Tensor, "n n r"]:
    r"""Offsets of all pairs of cells, query minus key, in cells.

    With $\delta = 8\,\Delta/(\mathrm{side}-1)$ on each axis: $\mathrm{sign}(\delta)\log_2(1 + |\delta|)/\log_2 8$.
    """
    axes = [torch.arange(side, dtype=torch.float32) for side in grid]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(grid))
    spans = torch.tensor([max(side - 1, 1) for side in grid], dtype=torch.float32)
    delta = (cells[:, None] - cells[None, :]) / spans * 8.0
    return delta.sign() * (delta.abs() + 1.0).log2() / math.log2(8.0)


@positions.register("log_cpb", family="bias")
class LogCPB(Position):
    r"""Log-spaced continuous position bias (Liu et al. 2022; in the form of TransNeXt, Shi 2023).

    $$b_{hij} = W_2\,\mathrm{ReLU}(W_1\,\delta_{ij} + c_1) + c_2$$

    Args:
        num_heads: heads, each with its own output of the MLP.
        head_dim: width of a query; not used.
        rank: rank of the grid, which must be given to the mixer.
        hidden: width of the MLP.
    """

    def __init__(self, num_heads: int, head_dim: int, *, rank: int = 2, hidden: int = 512) -> None:
        super().__init__(num_heads, head_dim)
        self.rank = rank
        self.fc1 = nn.Linear(rank, hidden)
        self.fc2 = nn.Linear(hidden, num_heads)
        self.offsets: Tensor | None = None
        self.index: Tensor | None = None

    def tabulate(self, offsets: Float[Tensor, "u r"], index: Int[Tensor, "n m"]) -> None:
        """Use these offsets, the pair (i, j) reading row ``index[i, j]``, instead of those of the grid."""
        self.offsets, self.index = offsets, index

    def bias(
        self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None
    ) -> Float[Tensor, "#b h n m"] | None:
        """The biases (1, h, n, n); ValueError if the grid has another rank."""
        if self.offsets is None or self.index is None:
            if grid is None or len(grid) != self.rank:
                raise ValueError(f"grid: position 'log_cpb' was built for rank {self.rank}, got {grid}")
            offsets, index = log_offsets(grid), None
        else:
            offsets, index = self.offsets, self.index
        table = self.fc2(torch.relu(self.fc1(offsets.to(q))))
        return (table if index is None else table[index]).movedim(-1, 0)[None]
