"""Windows of long filters: how the weight of a place falls with its distance, a channel at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

WINDOWS = ("standard", "learn", "symmetric", "none")


class Window(nn.Module):
    r"""$h_a \left(\prod_x e^{-t_x |\delta_x|} + \beta\right)$ for a filter h on some axes, $\delta$ and $\beta$ of each channel.

    $\delta$ runs over the channels from $\ln(0.01)/1.5$ to $\ln(0.01)/0.3$. "standard" keeps it so and has $\beta = 0$; "learn"
    learns both; "symmetric" has one learned $\delta$ on the number of steps, $e^{-|\delta| \sum_x a_x} + \beta$; "none" leaves
    filters as they are.

    Args:
        channels: of the filter.
        axes: of the filter.
        mode: one of `WINDOWS`.
        sqrt: take the square root of the falling part.

    Raises:
        ValueError: for an unknown mode, or "symmetric" on one axis of a product.
    """

    def __init__(
        self,
        channels: int,
        axes: int,
        mode: str,
        *,
        sqrt: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in WINDOWS:
            raise ValueError(f"window: expected one of {WINDOWS}, got {mode!r}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mode, self.sqrt = mode, sqrt
        rates = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, channels, **place)
        rates = rates.repeat(1 if mode == "symmetric" else axes, 1)
        self.rates: Tensor
        if mode == "standard":
            self.register_buffer("rates", rates)
        elif mode != "none":
            self.rates = nn.Parameter(rates)
        self.shift = nn.Parameter(torch.rand(channels, **place)) if mode in ("learn", "symmetric") else None

    def forward(self, h: Float[Tensor, "*grid c"], t: Sequence[Float[Tensor, " n"]]) -> Float[Tensor, "*grid c"]:
        """The filter under its window.

        Args:
            h: weights, channels last.
            t: positions on each axis, from 0 for the place itself to 1 for the furthest.
        """
        if self.mode == "none":
            return h
        exponent = h.new_zeros(())
        for axis, positions in enumerate(t):
            if self.mode == "symmetric":
                positions, rates = torch.arange(len(positions), device=h.device, dtype=h.dtype), self.rates[0]
            else:
                rates = self.rates[axis]
            fall = positions[:, None].to(h.dtype) * rates.abs()
            exponent = exponent + fall.view(-1, *[1] * (len(t) - 1 - axis), fall.shape[-1])
        decay = torch.exp(-0.5 * exponent if self.sqrt else -exponent)
        return h * (decay if self.shift is None else decay + self.shift)
