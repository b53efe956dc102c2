"""The two-layer perceptron of the Transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.channel_mixers.contract import ChannelMixer
from attnlab.channel_mixers.registry import channel_mixers
from attnlab.core.grid import Grid


@channel_mixers.register("mlp")
class MLP(ChannelMixer):
    r"""$W_2\,\mathrm{GELU}(W_1 x + b_1) + b_2$ with the exact GELU, $x\,\Phi(x)$.

    Args:
        dim: width of the tokens.
        hidden: inner width; by default 4 dim.
        bias: whether both layers have one.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, 4 * dim if hidden is None else hidden)
        self.up = nn.Linear(dim, self.hidden, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(self.hidden, dim, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "b n c"]:
        """Each token through both layers; ``mask`` and ``grid`` make no difference."""
        return self.down(F.gelu(self.up(x)))
