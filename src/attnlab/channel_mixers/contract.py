"""The contract of a channel mixer: tokens in, tokens of the same shape out."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.core.info import Info


class ChannelMixer(nn.Module):
    """Maps tokens (batch, n, dim) to the same shape; a subclass implements `forward`.

    A subclass that reads a token's neighbours (a convolutional one, say) sets ``per_token = False``; such a one is refused where
    tokens come piece by piece or must not see the future.

    Args:
        dim: width of the tokens.
        hidden: inner width; None takes the subclass's default, a fixed ratio of ``dim``.

    Raises:
        ValueError: if a width is not positive.
    """

    info: ClassVar[Info]
    per_token: ClassVar[bool] = True

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        self.dim, self.hidden = dim, hidden

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "b n c"]:
        """Mix the channels.

        Args:
            x: tokens, (batch, n, dim), zero at masked ones.
            mask: (batch, n), True marks a real token; the block zeroes the output at the others.
            grid: sides whose product is n, or None for a sequence.
        """
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement forward")
