"""A short causal depthwise convolution with a streaming state."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.ops.short_conv import short_conv


class ShortConvolution(nn.Module):
    r"""$y_t = b + \sum_{k=0}^{w-1} W_k\, x_{t-(w-1)+k}$ a channel, zeros before the first token.

    Args:
        channels: c.
        width: w, taps; the last one is the current token.
        bias: whether b is there.
    """

    def __init__(
        self,
        channels: int,
        width: int = 4,
        *,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width of the short convolution: expected at least 1, got {width}")
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(channels, width, device=device, dtype=dtype).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if bias else None

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "b w1 c"]:
        """The state before the first token: zeros for the last w - 1 inputs."""
        channels, width = self.weight.shape
        return torch.zeros(batch_size, width - 1, channels, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "b n c"], state: Float[Tensor, "b w1 c"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b w1 c"]]:
        """The convolved tokens and the last w - 1 inputs."""
        return short_conv(x, self.weight, self.bias, state=state)
