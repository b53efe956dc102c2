"""Continuous position bias: a small MLP on log-spaced offsets of a grid."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.ops.attention import Pairwise
from attnlab.positions.base import Position, positions
from attnlab.positions.grid_offsets import spread, unique_offsets


def log_offsets(grid: Grid, span: int | None = None) -> Float[Tensor, "u r"]:
    r"""All offsets on a grid, query minus key, in the order of `unique_offsets`.

    With $\delta = 8\,\Delta/(\mathrm{side}-1)$ on each axis: $\mathrm{sign}(\delta)\log_2(1 + |\delta|)/\log_2 8$; ``span``
    stands in for the sides.
    """
    spans = torch.tensor([max((side if span is None else span) - 1, 1) for side in grid], dtype=torch.float32)
    delta = unique_offsets(grid, torch.device("cpu")) / spans * 8.0
    return delta.sign() * (delta.abs() + 1.0).log2() / math.log2(8.0)


@positions.register("log_cpb", family="bias", paper="transnext", partial=True)
class LogCPB(Position):
    r"""Log-spaced continuous position bias (Liu et al. 2022; in the form of TransNeXt, Shi 2023).

    $$b_{hij} = W_2\,\mathrm{ReLU}(W_1\,\delta_{ij} + c_1) + c_2$$

    Args:
        num_heads: heads, each with its own output of the MLP.
        head_dim: width of a query; not used.
        rank: rank of the grid, which must be given to the mixer.
        hidden: width of the MLP.
        span: the side by which offsets are divided, that of training; by default that of the grid at hand.

    Raises:
        ValueError: in use, for a grid of another rank, or without ``span`` where causal: an output would depend on how many
            tokens follow.
    """

    def __init__(self, num_heads: int, head_dim: int, *, rank: int = 2, hidden: int = 512, span: int | None = None) -> None:
        super().__init__(num_heads, head_dim)
        self.rank, self.span = rank, span
        self.fc1 = nn.Linear(rank, hidden)
        self.fc2 = nn.Linear(hidden, num_heads)
        self.offsets: Tensor | None = None
        self.index: Tensor | None = None

    def tabulate(self, offsets: Float[Tensor, "u r"], index: Int[Tensor, "n m"]) -> None:
        """Use these offsets, the pair (i, j) reading row ``index[i, j]``, instead of those of the grid."""
        self.offsets, self.index = offsets, index

    def _values(self, offsets: Tensor, q: Tensor) -> Float[Tensor, "h u"]:
        values: Tensor = self.fc2(torch.relu(self.fc1(offsets.to(q))))
        return values.mT

    def bias(
        self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None
    ) -> Float[Tensor, "#b h n m"] | Pairwise:
        """The biases of the grid, each offset evaluated once; ValueError if it has another rank."""
        if self.offsets is not None and self.index is not None:
            return self._values(self.offsets, q)[:, self.index][None]
        grid = self.grid_of_rank((num_keys,) if grid is None else grid, self.rank)
        if causal and self.span is None:
            raise ValueError("span: expected the training length with causal=True (position_options={'span': 512}), got None")
        return spread(self._values(log_offsets(grid, self.span), q), grid, q.shape[2])
