"""Relative position: a learned vector a distance, met by the queries beside the keys."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.ops.attention import Pairwise
from attnlab.positions.base import Position, offsets_between, positions


@positions.register("relative", family="bias", paper="music-transformer")
class RelativePosition(Position):
    r"""Learned relative position in the logits (Shaw et al. 2018, equation 5; Huang et al. 2018, section 3.4).

    $$b_{ij} = s\,(q_i^\top e_{\mathrm{clip}(j - i)} + t_{\mathrm{clip}(j - i)}), \qquad
      e \in \mathbb{R}^{h \times (2r+1) \times d}, \quad t \in \mathbb{R}^{h \times (2r+1)} \text{ (optional)}$$

    Queries meet the table by offset, and the rows of a block of queries are shifted against each other by a change of stride
    (the authors' skewing): O((n + m) d) memory, no index and no n x m tensor.

    Args:
        num_heads: heads, each with its own table.
        head_dim: width of a query.
        max_distance: r; distances beyond it share the last vector.
        shared: one table for all heads.
        scalars: whether there is t, the part of a distance that no query changes (Dai et al. 2019), 0 at first.

    Raises:
        ValueError: for a distance below 1.

    Differs from the paper: where the authors slice a table that is as long as the sequence, distances are clipped; the local
    (blocked) variant is a matter of the mixer. Their extra terms for pitch and time are left out.
    """

    def __init__(
        self, num_heads: int, head_dim: int, *, max_distance: int = 128, shared: bool = False, scalars: bool = False
    ) -> None:
        super().__init__(num_heads, head_dim)
        if max_distance < 1:
            raise ValueError(f"max_distance: expected at least 1, got {max_distance}")
        self.max_distance = max_distance
        tables = 1 if shared else num_heads
        self.table = nn.Parameter(torch.randn(tables, 2 * max_distance + 1, head_dim) * head_dim**-0.5)
        self.scalars = nn.Parameter(torch.zeros(tables, 2 * max_distance + 1)) if scalars else None

    def bias(self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None) -> Pairwise:
        """The vectors and scalars of all offsets, scaled like the keys."""
        reach = self.max_distance
        rows = offsets_between(q.shape[2], num_keys, q.device).clamp(-reach, reach) + reach
        keys: Tensor = self.table.to(q.dtype)[:, rows]
        offsets = None if self.scalars is None else self.scalars.to(q.dtype)[:, rows] * q.shape[-1] ** -0.5
        return Pairwise(keys=keys, offsets=offsets)
