"""The damped exponential moving average of several orders, and both its directions as one layer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.mixers.parts.selective_ssm import SelectiveSSM
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.selective_scan import selective_scan

KINDS = ("ema", "s4d")


class DampedEMA(nn.Module):
    r"""Multi-dimensional damped EMA (Ma et al. 2022, Mega, equation 5), with a residual weight.

    For every channel, with $\alpha, \delta \in (0, 1)^r$, $\beta, \eta \in \mathbb{R}^r$ and $\omega \in \mathbb{R}$,

    $$h_t = \alpha \odot \beta\, u_t + (1 - \alpha \odot \delta) \odot h_{t-1}, \quad y_t = \eta^\top h_t / \sqrt r + \omega u_t$$

    Args:
        channels: c.
        order: r.
        skip: whether $\omega$ is there.
    """

    def __init__(
        self,
        channels: int,
        order: int,
        *,
        skip: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (channels, order)
        self.alpha, self.delta = (nn.Parameter(0.2 * torch.randn(shape, **place)) for _ in range(2))
        signs = torch.ones(order, **place)
        signs[1::2] = -1.0
        self.beta = nn.Parameter(signs + 0.02 * torch.randn(shape, **place))
        self.eta = nn.Parameter(torch.randn(shape, **place))
        self.omega = nn.Parameter(torch.ones(channels, **place)) if skip else None

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "b c r"]:
        """Averages of nothing, in float32 or wider."""
        return torch.zeros(batch_size, *self.alpha.shape, device=device, dtype=accumulate_dtype(dtype))

    def forward(
        self, u: Float[Tensor, "b n c"], state: Float[Tensor, "b c r"] | None, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b c r"]]:
        """The averages and the state after the last token; masked tokens neither enter it nor damp it."""
        enter = self.alpha.sigmoid()
        damp = (enter * self.delta.sigmoid()).clamp(max=1.0 - torch.finfo(enter.dtype).eps)
        steps = torch.ones_like(u) if mask is None else mask.unsqueeze(-1).to(u.dtype).expand_as(u)
        read = self.eta * self.eta.shape[1] ** -0.5
        return selective_scan(u, steps, torch.log1p(-damp), enter * self.beta, read, D=self.omega, initial_state=state)


class Structure(nn.Module):
    """A linear layer along the sequence: from the past, or, not causal, the sum of one from each side.

    Args:
        channels: c.
        order: states a channel.
        kind: "ema" (`DampedEMA`) or "s4d" (a diagonal state space with complex states, Gu et al. 2022).
        causal: whether it reads the past alone.

    Raises:
        ValueError: for an unknown kind or an order below 1.
    """

    def __init__(
        self,
        channels: int,
        order: int,
        kind: str,
        *,
        causal: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"structure: expected one of {KINDS}, got {kind!r}")
        if order < 1:
            raise ValueError(f"structure_dim: expected at least 1, got {order}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        def layer(*, skip: bool) -> DampedEMA | SelectiveSSM:
            if kind == "ema":
                return DampedEMA(channels, order, skip=skip, **place)
            return SelectiveSSM(channels, order, 1, complex_states=True, selective=(), skip=skip, **place)

        self.past = layer(skip=True)
        self.future = None if causal else layer(skip=False)

    def forward(
        self, u: Float[Tensor, "b n c"], state: Float[Tensor, "b c ..."] | None, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b c ..."]]:
        """The layer's outputs and the state of what reads the past."""
        y, state = self.past(u, state, mask)
        if self.future is not None:
            back, _ = self.future(u.flip(1), None, None if mask is None else mask.flip(1))
            y = y + back.flip(1)
        return y, state
