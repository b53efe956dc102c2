"""Universal relative position: weights by offset that multiply the attention map after its normaliser."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.ops.attention import Pairwise
from attnlab.positions.base import Position, offsets_between, positions


@positions.register("urpe", family="bias", paper="urpe")
class UniversalRelativePosition(Position):
    r"""Attention whose normalised map is multiplied by a learned Toeplitz matrix (Luo et al. 2022, equation 7).

    $$o_i = \sum_j \mathrm{softmax}_j(s\, q_i^\top k_j + b_{\mathrm{clip}(j-i)})\; c_{\mathrm{clip}(j-i)}\; v_j$$

    With a bias alone the rows sum to one, so that identical tokens give identical outputs wherever they stand; the factor, not
    normalised again, lets the attention tell positions apart. It is 1 at first and may become negative. Memory O(n + m).

    Args:
        num_heads: heads, each with its own b and c.
        head_dim: width of a query; not used.
        max_distance: offsets beyond it share the last entry.
        bias: whether there is the additive b beside c.

    Raises:
        ValueError: for a distance below 1.

    Differs from the paper: offsets have an entry each up to ``max_distance`` (its "unique" scheme) instead of log-spaced
    buckets; tables are the mixer's own and not shared by layers.
    """

    def __init__(self, num_heads: int, head_dim: int, *, max_distance: int = 128, bias: bool = True) -> None:
        super().__init__(num_heads, head_dim)
        if max_distance < 1:
            raise ValueError(f"max_distance: expected at least 1, got {max_distance}")
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.ones(num_heads, 2 * max_distance + 1))
        self.shift = nn.Parameter(torch.zeros(num_heads, 2 * max_distance + 1)) if bias else None

    def _rows(self, table: Tensor, q: Tensor, num_keys: int) -> Pairwise:
        reach = self.max_distance
        rows = offsets_between(q.shape[2], num_keys, q.device).clamp(-reach, reach) + reach
        return Pairwise(offsets=table.to(q.dtype)[:, rows])

    def bias(self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None) -> Pairwise | None:
        """b by offset."""
        return None if self.shift is None else self._rows(self.shift, q, num_keys)

    def factor(self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None) -> Pairwise:
        """c by offset."""
        return self._rows(self.weight, q, num_keys)
