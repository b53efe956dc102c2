"""A two-layer perceptron of each slot's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.channel_mixers.contract import ChannelMixer
from attnlab.channel_mixers.registry import channel_mixers
from attnlab.core.grid import Grid
from attnlab.mixers.parts.slot_linear import SlotLinear


@channel_mixers.register("slot_mlp", paper="hiformer")
class SlotMLP(ChannelMixer):
    r"""$W_{2,i}\,\mathrm{GELU}(W_{1,i} x_i + b_{1,i}) + b_{2,i}$, weights of its own for each of L slots (Gui et al. 2023).

    Args:
        dim: width of the tokens.
        hidden: inner width; by default 4 dim.
        num_slots: L, how many tokens there are.
        bias: whether both layers have one.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if ``num_slots`` is less than 1, or there is another number of tokens.
    """

    per_token = False  # the place of a token decides which weights it gets

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        num_slots: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, 4 * dim if hidden is None else hidden)
        if num_slots < 1:
            raise ValueError(f"num_slots: expected a positive integer, got {num_slots}")
        self.num_slots = num_slots
        self.up = SlotLinear(num_slots, dim, self.hidden, bias=bias, device=device, dtype=dtype)
        self.down = SlotLinear(num_slots, self.hidden, dim, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "b n c"]:
        """Each token through the layers of its slot; ``mask`` and ``grid`` make no difference."""
        if x.shape[1] != self.num_slots:
            raise ValueError(f"x: expected {self.num_slots} tokens as num_slots says, got {x.shape[1]}")
        return self.down(F.gelu(self.up(x)))
