"""Decays: fixed schedules a head, and what a layer learns or makes of the token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.positions.alibi import alibi_slopes

SCHEDULES = ("alibi", "none")


def log_decay(schedule: str, num_heads: int, layer: int = 0, num_layers: int = 1) -> Float[Tensor, "h"] | None:
    r"""Logarithm of each head's decay a token, $-s_h (1 - l/(L-1) + 10^{-5})$ with ALiBi's slopes $s_h$; None for "none".

    Args:
        schedule: "alibi" or "none".
        num_heads: heads.
        layer: l, from 0; the last layer has almost no decay.
        num_layers: L; 1 leaves the slopes as they are.

    Raises:
        ValueError: for an unknown schedule or a layer outside of 0..L-1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"decay: expected one of {SCHEDULES}, got {schedule!r}")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer: expected 0 to num_layers - 1 = {num_layers - 1}, got {layer}")
    if schedule == "none":
        return None
    factor = 1.0 if num_layers == 1 else 1.0 - layer / (num_layers - 1) + 1e-5
    return torch.tensor([-slope * factor for slope in alibi_slopes(num_heads)])


class LearnedDecay(nn.Module):
    r"""The same decay $e^{-\mathrm{softplus}(\theta)}$ at every token, one for each channel of a head or one in all.

    Args:
        num_heads: h.
        width: channels of a head, or 1.
        horizons: tokens after which 1/e is left, at first: spread evenly on a logarithmic scale between these two over the heads.
    """

    def __init__(
        self,
        num_heads: int,
        width: int,
        horizons: tuple[float, float] = (4.0, 1024.0),
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        spread = torch.linspace(math.log(horizons[0]), math.log(horizons[1]), num_heads, device=device, dtype=dtype)
        rate = torch.exp(-spread)
        self.rate = nn.Parameter(torch.expm1(rate).log()[:, None].repeat(1, width))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n w"]:
        """The logarithm of every token's decay."""
        return -F.softplus(self.rate)[None, :, None].expand(x.shape[0], -1, x.shape[1], -1)


class ChannelDecay(nn.Module):
    r"""A decay a channel and token, $\sigma(W_2 W_1 x + b)^{1/\tau}$ (Yang et al. 2023, gated linear attention, equation 3).

    Args:
        dim: width of the tokens.
        num_heads: h.
        width: channels of a head.
        rank: width between $W_1$ and $W_2$.
        temperature: $\tau$: the larger, the slower the decay.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        width: int,
        rank: int = 16,
        temperature: float = 16.0,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.temperature = num_heads, temperature
        self.down = nn.Linear(dim, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, num_heads * width, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n w"]:
        """The logarithm of every token's decay."""
        logits = self.up(self.down(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return F.logsigmoid(logits) / self.temperature


class StepDecay(nn.Module):
    r"""A decay a head and token, $e^{-A \Delta}$ with a step $\Delta = \mathrm{softplus}(W x + b)$ (Dao and Gu 2024, Mamba-2).

    A begins uniform in (0, 16), b such that the steps at x = 0 are uniform on a logarithmic scale in (0.001, 0.1).

    Args:
        dim: width of the tokens.
        num_heads: h.
    """

    def __init__(self, dim: int, num_heads: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, num_heads, bias=False, device=device, dtype=dtype)
        rates = torch.empty(num_heads, device=device, dtype=dtype).uniform_(1e-3, 16.0)
        steps = torch.empty(num_heads, device=device, dtype=dtype).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        self.A_log = nn.Parameter(rates.log())
        self.bias = nn.Parameter(steps + (-torch.expm1(-steps)).log())  # the inverse of softplus
        for parameter in (self.A_log, self.bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def steps(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n 1"]:
        """The step of every token."""
        return F.softplus(self.proj(x) + self.bias).transpose(1, 2).unsqueeze(-1)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n 1"]:
        """The logarithm of every token's decay."""
        return -self.A_log.exp()[:, None, None] * self.steps(x)
