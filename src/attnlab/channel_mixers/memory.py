"""The feed-forward block of MemoryFormer: two lookup layers and a norm, no activation."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.channel_mixers.contract import ChannelMixer
from attnlab.channel_mixers.registry import channel_mixers
from attnlab.core.grid import Grid
from attnlab.mixers.parts.lookup_linear import LookupLinear


@channel_mixers.register("memory", paper="memoryformer")
class MemoryFeedForward(ChannelMixer):
    r"""$M_2(\mathrm{LN}(M_1(x)))$ with two `LookupLinear` layers (Ding et al. 2024, MemoryFormer).

    $M_1$ addresses K = dim / tau tables of $2^\tau$ rows; the hidden channels make chunks of tau + extra, so $M_2$ has as many
    tables of $2^{\tau + \text{extra}}$ rows. Time O(K (hidden + dim)) a token.

    Args:
        dim: width of the tokens, a multiple of ``tau``.
        hidden: inner width, a multiple of tau + extra_bits; by default K (tau + extra_bits).
        tau: width of a chunk of the input.
        extra_bits: what a chunk of the hidden channels has more.
        weight: of a row, see `lookup_addresses`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for widths that the chunks do not divide, or an unknown weight.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        tau: int = 8,
        extra_bits: int = 2,
        weight: str = "l1_prob",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        wide = tau + extra_bits
        super().__init__(dim, dim // max(tau, 1) * wide if hidden is None else hidden)
        if extra_bits < 0 or self.hidden % wide:
            raise ValueError(
                f"hidden: expected a multiple of tau + extra_bits = {wide}, with extra_bits >= 0, got {self.hidden}, {extra_bits}"
            )
        self.up = LookupLinear(dim, self.hidden, tau=tau, weight=weight, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(self.hidden, device=device, dtype=dtype)
        self.down = LookupLinear(self.hidden, dim, tau=wide, weight=weight, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "b n c"]:
        """Each token through both layers; ``mask`` and ``grid`` make no difference."""
        return self.down(self.norm(self.up(x)))
