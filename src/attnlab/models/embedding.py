"""Positions added to embedded tokens, counted over real tokens so that padding shifts nothing."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.core.errors import UnknownNameError, nearest

POSITIONS = ("none", "learned", "sinusoidal", "interleaved_sinusoidal")
"""Names that `PositionEmbedding` takes."""


def sinusoids(positions: Int[Tensor, "b n"], dim: int, dtype: torch.dtype) -> Float[Tensor, "b n {dim}"]:
    r"""$\sin(p\,\omega_i)$ in the first half of the channels, $\cos$ in the second, $\omega_i = 10000^{-2i/d}$."""
    half = (dim + 1) // 2
    rates = torch.exp(torch.arange(half, device=positions.device, dtype=torch.float32) * (-2.0 * math.log(10000.0) / dim))
    angles = positions[..., None].float() * rates
    return torch.cat([angles.sin(), angles.cos()[..., : dim - half]], dim=-1).to(dtype)


def interleaved_sinusoids(positions: Int[Tensor, "b n"], dim: int, dtype: torch.dtype) -> Float[Tensor, "b n {dim}"]:
    r"""The same numbers with $\sin(p\,\omega_i)$ and $\cos(p\,\omega_i)$ side by side, in channels 2i and 2i + 1."""
    half = (dim + 1) // 2
    apart = sinusoids(positions, dim, dtype)
    order = [channel // 2 + half * (channel % 2) for channel in range(dim)]
    return apart[..., order]


class PositionEmbedding(nn.Module):
    """Adds a vector a position.

    Args:
        name: "none", "learned" (a table of ``max_length``), "sinusoidal" (Vaswani et al. 2017) or
            "interleaved_sinusoidal", the same with sines and cosines by turns.
        dim: channels.
        max_length: positions of the learned table.
        std: standard deviation of the learned table at first: about that of what it is added to, or training starts
            without a sense of place.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnknownNameError: for an unknown name.
        ValueError: for "learned" without ``max_length``.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        max_length: int | None = None,
        *,
        std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if name not in POSITIONS:
            hint = nearest(name, POSITIONS)
            raise UnknownNameError(f"position: expected one of {POSITIONS}, got {name!r}{hint}")
        if name == "learned" and max_length is None:
            raise ValueError("max_length: expected a positive integer with position='learned', got None")
        self.name, self.max_length = name, max_length
        self.table: nn.Parameter | None = None
        if name == "learned" and max_length is not None:
            self.table = nn.Parameter(torch.empty(max_length, dim, device=device, dtype=dtype).normal_(std=std))
            self.table._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Float[Tensor, "b n c"], positions: Int[Tensor, "#b n"]) -> Float[Tensor, "b n c"]:
        """``x`` with its positions added.

        Raises:
            ValueError: for a position beyond the learned table.
        """
        if self.name == "sinusoidal":
            return x + sinusoids(positions, x.shape[-1], x.dtype)
        if self.name == "interleaved_sinusoidal":
            return x + interleaved_sinusoids(positions, x.shape[-1], x.dtype)
        if self.table is None:
            return x
        return x + self.table[positions]

    def check_length(self, length: int) -> None:
        """ValueError if ``length`` tokens do not fit the learned table."""
        if self.table is not None and self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"tokens: expected at most max_length={self.max_length} of the learned positions, got {length}; "
                "position='sinusoidal' or 'none' has no such limit"
            )
