"""Dilation and erosion of an image, channel by channel: of the max-plus algebra, or by convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

KINDS = ("convolution", "max_plus")


class Morphology(nn.Module):
    r"""Dilation and erosion with structuring elements $w$, $w'$ of k x k cells a channel, out of which cells are left where
    ``mask`` is False or the image ends.

    "max_plus": $\mathrm{dil}(x)_p = \max_o (x_{p+o} + w_o)$ and $\mathrm{ero}(x)_p = \min_o (x_{p+o} - w'_o)$, flat at first.
    "convolution" (MorpMamba's code): $\mathrm{dil}(x)_p = \sum_o w_o x_{p+o}$ and $\mathrm{ero}(x)_p = -\sum_o w'_o x_{p+o}$, at
    first sums over the box. A single element serves all channels of ``channels=1``.

    Args:
        channels: elements; 1 or the channels of the image.
        size: k, odd.
        kind: "convolution" or "max_plus".
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an even size or an unknown kind.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        kind: str = "convolution",
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {size}")
        if kind not in KINDS:
            raise ValueError(f"morphology: expected one of {KINDS}, got {kind!r}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        make = torch.ones if kind == "convolution" else torch.zeros
        self.kind = kind
        self.dilation = nn.Parameter(make(channels, 1, size, size, **place))
        self.erosion = nn.Parameter(make(channels, 1, size, size, **place))

    def forward(
        self, x: Float[Tensor, "b c h w"], mask: Bool[Tensor, "#b #c #h #w"] | None = None
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Dilation and erosion, 0 where ``mask`` is False; ``x`` is zero there."""
        if self.kind == "convolution":
            dilated, eroded = self._convolve(x, self.dilation), -self._convolve(x, self.erosion)
        else:
            dilated, eroded = _dilate(x, self.dilation, mask), -_dilate(-x, self.erosion, mask)
        if mask is None:
            return dilated, eroded
        return dilated.masked_fill(~mask, 0.0), eroded.masked_fill(~mask, 0.0)

    @staticmethod
    def _convolve(x: Tensor, weight: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(x, weight.expand(channels, -1, -1, -1), padding=weight.shape[-1] // 2, groups=channels)


def _dilate(x: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """One offset after the other, so that no neighbourhood is laid out in memory."""
    height, width = x.shape[2:]
    size = weight.shape[-1]
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf)
    padded = F.pad(x, (size // 2,) * 4, value=-torch.inf)
    result = torch.full_like(x, -torch.inf)
    for i in range(size):
        for j in range(size):
            moved = padded[:, :, i : i + height, j : j + width] + weight[None, :, 0, i, j, None, None]
            result = torch.maximum(result, moved)
    return result
