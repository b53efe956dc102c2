"""Zero inputs that complete a grid and take part like any token: how some released code treats borders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.core.windows import Windows

Mix = Callable[[Tensor, None, Masks, Grid], Tensor]
"""A mixer's `mix`."""


def mix_with_zero_tokens(mix: Mix, x: Float[Tensor, "b n c"], masks: Masks, grid: Grid, padded: Grid) -> Float[Tensor, "b n c"]:
    """``mix`` on the grid with zeros at the end of each axis up to the sides ``padded``; they are real tokens, and cropped."""
    windows = Windows(grid, padded)
    real = torch.ones_like(x[..., 0], dtype=torch.bool) if masks.query is None else masks.query
    real = windows.pad(real.unsqueeze(-1), value=True).squeeze(-1)
    return windows.crop(mix(windows.pad(x), None, Masks(real, real), windows.padded))
