"""Short-term context between entities: a convolution over entities and frames, each entity its filters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks


@mixers.register(
    "short_context",
    family="partitioned",
    paper="loconet",
    supports=Supports(grid=frozenset({2}), cost=1.0),
    example={"entities": 2, "kernel_size": 3},
)
class ShortContext(Mixer):
    r"""LoCoNet's short-term inter-speaker module (Wang et al. 2023, section 3.3), on a grid of entities and frames.

    For entity s at frame t, S entities, a kernel of k frames and filters $F_s \in \mathbb{R}^{S \times k \times C \times C}$,

    $$u_{st} = \mathrm{LN}\Big(b_s + \sum_{s'=1}^{S} \sum_{|\tau| \le k/2} F_{s s' \tau}\, x_{s', t + \tau}\Big), \qquad
      y_{st} = W_2\, \mathrm{GELU}(W_1 u_{st} + b_1) + b_2$$

    which a residual adds to x. More than S entities are cut into groups of S, and those that are not there are zero. Beside it
    stands the long-term attention of each speaker, `group_axes` along the frames: LoCoNet takes three of the pairs. Time
    O(n S k C^2), memory O(n C).

    Args:
        dim: width of the tokens, C.
        num_heads: of no consequence.
        causal: always False.
        entities: S.
        kernel_size: k, odd.
        hidden: width between W1 and W2; by default 2 C.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for fewer than one entity, an even kernel, or a hidden width below 1.
        UnsupportedError: with ``causal=True``, it looks k / 2 frames ahead; for a grid of another rank.

    Differs from the paper: in nothing for S entities. Filters hang on the place of an entity: permuting them changes the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        entities: int = 3,
        kernel_size: int = 7,
        hidden: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        hidden = 2 * dim if hidden is None else hidden
        if entities < 1:
            raise ValueError(f"entities: expected at least 1, got {entities}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if hidden < 1:
            raise ValueError(f"hidden: expected at least 1, got {hidden}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.entities = entities
        self.conv = nn.Conv2d(dim, dim * entities, (entities, kernel_size), padding=(0, kernel_size // 2), **place)
        self.norm = nn.LayerNorm(dim, **place)
        self.up, self.down = nn.Linear(dim, hidden, **place), nn.Linear(hidden, dim, **place)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Convolve each group of entities, then each token by itself."""
        rows, frames = grid
        table = F.pad(x.unflatten(1, grid), (0, 0, 0, 0, 0, -rows % self.entities))
        table = rearrange(table, "b (g s) t c -> (b g) c s t", s=self.entities)
        mixed = self.conv(table).squeeze(2).unflatten(1, (self.dim, self.entities))
        mixed = rearrange(mixed, "(b g) c s t -> b (g s t) c", b=x.shape[0])[:, : rows * frames]
        return self.down(F.gelu(self.up(self.norm(mixed))))
