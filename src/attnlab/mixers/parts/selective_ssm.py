"""The selective state space as a layer of its own: the maps that make step, input and output vectors, and the scan."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Inexact
from torch import Tensor, nn

from attnlab.core.dynamics import Dynamics
from attnlab.mixers.parts.conjugate_pairs import as_complex, pair_dynamics
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.selective_scan import selective_scan

SELECTIVE = ("delta", "B", "C")


class SelectiveSSM(nn.Module):
    r"""S6 on e channels with s states each (Gu and Dao 2023, algorithm 2): what stands between convolution and gate of Mamba.

    $(\rho, B_t, C_t) = W_x x_t$, $\Delta_t = \mathrm{softplus}(W_\Delta \rho + b)$, $A = -e^{A_{log}} + i A_{im}$, and a channel

    $$h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t x_t, \qquad y_t = C_t^\top h_t + D x_t$$

    (twice the real part of the product where A is complex). What ``selective`` does not name is the same at every token: B and C
    are then parameters (e, s), and the step is softplus(b).

    Args:
        channels: e.
        state_dim: s.
        dt_rank: width of $\rho$.
        dt_min: the smallest initial step.
        dt_max: the largest initial step.
        dt_init: of $W_\Delta$: "random", uniform within $\pm$ dt_scale dt_rank^(-1/2), or "constant", at that bound.
        dt_scale: see there.
        dt_init_floor: a bound below the initial steps.
        groups: sets of neighbouring channels, each with B and C of its own; a divisor of ``channels``.
        complex_states: A begins at -1/2 + i pi n (S4D-Lin) in place of -(n + 1) (S4D-Real); a state stands for a conjugate pair.
        selective: which of "delta", "B" and "C" depend on the token.
        skip: whether D is there.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a size below 1, groups that do not divide the channels, steps out of order, or an unknown name.
    """

    def __init__(
        self,
        channels: int,
        state_dim: int,
        dt_rank: int,
        *,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        groups: int = 1,
        complex_states: bool = False,
        selective: Collection[str] = SELECTIVE,
        skip: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(channels, state_dim, dt_rank, groups, selective)
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels, self.state_dim, self.groups, self.complex_states = channels, state_dim, groups, complex_states
        width = state_dim * (2 if complex_states else 1)
        per_token = {"delta": dt_rank, "B": groups * width, "C": groups * width}
        self.sizes = {name: size for name, size in per_token.items() if name in selective}
        self.x_proj = nn.Linear(channels, sum(self.sizes.values()), bias=False, **place) if self.sizes else None
        self.dt_proj = nn.Linear(dt_rank, channels, **place) if "delta" in selective else None
        bias = _initial_bias(torch.empty(channels, **place), dt_min, dt_max, dt_init_floor)
        self.dt_bias = nn.Parameter(bias) if self.dt_proj is None else None
        if self.dt_proj is not None:
            _initialise_steps(self.dt_proj, bias, dt_init, dt_scale)
        shape = (channels, state_dim, 2) if complex_states else (channels, state_dim)
        ones = torch.ones(shape, **place)
        if complex_states:
            ones[..., 1] = 0.0
        self.B = None if "B" in selective else nn.Parameter(ones)
        self.C = None if "C" in selective else nn.Parameter(torch.randn(shape, **place))
        states = torch.arange(0.0, state_dim, **place).expand(channels, -1)
        rate = torch.full_like(states, 0.5) if complex_states else states + 1.0
        self.A_log = nn.Parameter(rate.log())
        self.A_imag = nn.Parameter(math.pi * states) if complex_states else None
        self.D = nn.Parameter(torch.ones(channels, **place)) if skip else None
        for parameter in (self.A_log, self.A_imag, self.D, self.dt_bias, None if self.dt_proj is None else self.dt_proj.bias):
            if parameter is not None:
                parameter._no_weight_decay = True  # type: ignore[attr-defined, union-attr]

    @property
    def rates(self) -> Inexact[Tensor, "e s"]:
        """A, complex in no less than float32."""
        decay = -self.A_log.exp()
        if self.A_imag is None:
            return decay
        sums = accumulate_dtype(decay.dtype)
        return torch.complex(decay.to(sums), self.A_imag.to(sums))

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "b e ..."]:
        """Zero states (b, e, s) in float32 or wider; complex ones are held as (b, e, s, 2)."""
        shape = (batch_size, self.channels, self.state_dim) + ((2,) if self.complex_states else ())
        return torch.zeros(shape, device=device, dtype=accumulate_dtype(dtype))

    def coefficients(
        self, x: Float[Tensor, "b n e"], mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n e"], Inexact[Tensor, "..."], Inexact[Tensor, "..."]]:
        """Delta, in no less than float32, B and C as `selective_scan` takes them.

        A masked token has step 0, so that it neither writes nor decays.
        """
        found: dict[str, Tensor] = {}
        if self.x_proj is not None:
            found = dict(zip(self.sizes, self.x_proj(x).split(list(self.sizes.values()), dim=-1), strict=True))
        sums = accumulate_dtype(x.dtype)  # in bfloat16 the bias alone would cost small steps a hundredth of their size
        if self.dt_proj is not None:
            delta = F.softplus(F.linear(found["delta"], self.dt_proj.weight).to(sums) + self.dt_proj.bias)
        else:
            delta = F.softplus(cast("Tensor", self.dt_bias).to(sums)).expand_as(x)
        if mask is not None:
            delta = delta.masked_fill(~mask.unsqueeze(-1), 0.0)
        return delta, self._weights(found.get("B"), self.B), self._weights(found.get("C"), self.C)

    def forward(
        self, x: Float[Tensor, "b n e"], state: Float[Tensor, "b e ..."] | None, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n e"], Float[Tensor, "b e ..."]]:
        """The outputs and the states after the last token; ``x`` is zero at masked tokens."""
        delta, B, C = self.coefficients(x, mask)
        before = torch.view_as_complex(state) if self.complex_states and state is not None else state
        y, after = selective_scan(x, delta, self.rates, B, C, D=self.D, initial_state=before)
        return y, torch.view_as_real(after) if self.complex_states else after

    def digest(
        self, x: Float[Tensor, "b n e"], mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b e ..."], Float[Tensor, "b e ..."]]:
        r"""The states after a piece from zero, and the factor $e^{A \sum_t \Delta_t}$ on earlier ones, as states."""
        delta, B, C = self.coefficients(x, mask)
        after = selective_scan(x, delta, self.rates, B, C)[1]
        factor = (delta.to(accumulate_dtype(delta.dtype)).sum(1).unsqueeze(-1) * self.rates).exp()
        return (torch.view_as_real(after), torch.view_as_real(factor)) if self.complex_states else (after, factor)

    def scaled(self, state: Float[Tensor, "b e ..."], factor: Float[Tensor, "b e ..."]) -> Float[Tensor, "b e ..."]:
        """States times a factor that `digest` gave."""
        if not self.complex_states:
            return state * factor
        return torch.view_as_real(torch.view_as_complex(state) * torch.view_as_complex(factor))

    def matrix(self, x: Float[Tensor, "b n e"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b e n n"]:
        """What the scan makes of a unit impulse at each token, channel by channel, D on the diagonal."""
        b, n, channels = x.shape
        delta, B, C = (t if t.ndim == 2 else t.repeat_interleave(n, dim=0) for t in self.coefficients(x, mask))
        impulses = torch.eye(n, device=x.device, dtype=x.dtype)[None, :, :, None].expand(b, n, n, channels)
        y = selective_scan(impulses.reshape(b * n, n, channels), delta, self.rates, B, C, D=self.D)[0]
        return y.view(b, n, n, channels).permute(0, 3, 2, 1)

    def recurrence(self, x: Float[Tensor, "b n e"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        """The channels as heads. A complex state is two real ones, which its rate turns: then Lambda is dense, (2 s, 2 s)."""
        delta, B, C = self.coefficients(x, mask)
        steps = delta.transpose(1, 2).unsqueeze(-1)
        decay, write, read = (steps * self.rates.unsqueeze(1)).exp(), steps * self._per_channel(B), self._per_channel(C)
        skip = None if self.D is None else self.D[:, None].expand(steps.shape[:3])
        make = pair_dynamics if self.complex_states else Dynamics
        return make(decay, write, read.expand_as(write), skip)

    def _weights(self, projected: Tensor | None, constant: Tensor | None) -> Inexact[Tensor, "..."]:
        """One of B and C in a layout of the scan, complex from neighbouring pairs."""
        raw = cast("Tensor", projected if constant is None else constant)
        if self.complex_states:
            raw = as_complex(raw.unflatten(-1, (-1, 2)) if constant is None else raw)
        return raw if constant is not None or self.groups == 1 else raw.unflatten(-1, (self.groups, -1))

    def _per_channel(self, weights: Tensor) -> Tensor:
        """Weights in any layout of the scan as (b or 1, e, n or 1, s)."""
        if weights.ndim == 2:
            return weights[None, :, None]
        weights = weights.unsqueeze(2) if weights.ndim == 3 else weights
        by_group = weights.transpose(1, 2).unsqueeze(2)
        return by_group.expand(-1, -1, self.channels // self.groups, -1, -1).flatten(1, 2)


def _check(channels: int, state_dim: int, dt_rank: int, groups: int, selective: Collection[str]) -> None:
    for name, size in (("state_dim", state_dim), ("dt_rank", dt_rank), ("groups", groups)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if channels % groups:
        raise ValueError(f"groups: expected a divisor of the {channels} channels, got {groups}")
    if isinstance(selective, str) or not set(selective) <= set(SELECTIVE):
        raise ValueError(f"selective: expected some of {SELECTIVE}, got {selective!r}")


def _initial_bias(like: Tensor, low: float, high: float, floor: float) -> Tensor:
    """The inverse softplus of steps whose logarithms are uniform."""
    step = like.uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    return step + (-torch.expm1(-step)).log()


@torch.no_grad()
def _initialise_steps(layer: nn.Linear, bias: Tensor, kind: str, scale: float) -> None:
    bound = scale * layer.in_features**-0.5
    if kind == "random":
        nn.init.uniform_(layer.weight, -bound, bound)
    elif kind == "constant":
        nn.init.constant_(layer.weight, bound)
    else:
        raise ValueError(f"dt_init: expected 'random' or 'constant', got {kind!r}")
    layer.bias.copy_(bias)
