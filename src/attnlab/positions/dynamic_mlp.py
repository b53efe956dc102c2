"""Dynamic position bias: an MLP that reads offsets, so that one set of weights serves grids of every size."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.ops.attention import Pairwise
from attnlab.positions.base import Position, positions
from attnlab.positions.grid_offsets import spread, unique_offsets


@positions.register("dynamic_mlp", family="bias", paper="crossformer", partial=True)
class DynamicMLPPosition(Position):
    r"""Dynamic position bias (Wang et al. 2021, CrossFormer, section 3.3).

    $$b_{hij} = \mathrm{DPB}(\Delta_{ij})_h, \qquad
      \mathrm{DPB} = L_4 \circ \mathrm{A} \circ L_3 \circ \mathrm{A} \circ L_2 \circ \mathrm{A} \circ L_1, \quad
      \mathrm{A}(z) = \mathrm{ReLU}(\mathrm{LN}(z))$$

    on integer offsets $\Delta$, query minus key, each evaluated once.

    Args:
        num_heads: heads, each with its own output.
        head_dim: width of a query; with ``num_heads`` it sets the default of ``hidden``.
        rank: of the grid.
        hidden: width of the MLP; by default a sixteenth of the attention's width, at least 4.

    Raises:
        ValueError: for a rank or width below 1; in use, for a grid of another rank.
    """

    def __init__(self, num_heads: int, head_dim: int, *, rank: int = 2, hidden: int | None = None) -> None:
        super().__init__(num_heads, head_dim)
        hidden = max(num_heads * head_dim // 16, 4) if hidden is None else hidden
        if rank < 1 or hidden < 1:
            raise ValueError(f"rank, hidden: expected at least 1, got {rank} and {hidden}")
        self.rank = rank
        widths = (rank, hidden, hidden, hidden)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, num_heads))

    def bias(self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None) -> Pairwise:
        """The biases of the grid; a sequence is a grid of rank 1."""
        grid = self.grid_of_rank((num_keys,) if grid is None else grid, self.rank)
        values = self.mlp(unique_offsets(grid, q.device).to(q.dtype)).mT
        return spread(values, grid, q.shape[2])
