"""Mamba: a diagonal state-space recurrence whose step, input and output maps depend on the token."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.parts.short_convolution import ShortConvolution
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.selective_scan import selective_scan


@mixers.register(
    "mamba",
    family="recurrent",
    paper="mamba",
    supports=Supports(causal="always", streaming=True, mixing_matrix=True, state="bounded", cost=1.0),
    example={"state_dim": 4},
)
class Mamba(StreamingMixer):
    r"""Selective state space (Gu and Dao 2023, algorithm 2 and section 3.4), in its gated block.

    With E = expand * dim inner channels and N states a channel, $x, z = W_{in} u$, x through a short causal convolution and SiLU,
    $(\delta, B, C) = W_x x$ and $\Delta = \mathrm{softplus}(W_\Delta \delta + b)$:

    $$h_t = e^{\Delta_t A} \odot h_{t-1} + \Delta_t B_t x_t, \qquad y_t = C_t^\top h_t + D x_t, \qquad
      o_t = W_{out} (y_t \odot \mathrm{SiLU}(z_t))$$

    A = -exp(A_log) is diagonal, zero-order hold for A and the simplified (Euler) rule for B. Time O(n E N), memory O(n E): no
    n x E x N tensor. State: ``ssm`` (b, E, N) in float32 or wider and ``window`` (b, w - 1, E). The mixing matrix has E "heads",
    the inner channels, with D on its diagonal; values are the convolved x.

    Args:
        dim: width of the tokens.
        num_heads: of the common signature; the mechanism has no heads.
        causal: always True.
        state_dim: N.
        expand: E / dim.
        conv_size: w, taps of the short convolution.
        dt_rank: width of delta; by default ceil(dim / 16).
        dt_min: the smallest initial step.
        dt_max: the largest initial step.
        dt_init_floor: a bound below the initial steps.
        conv_bias: bias of the convolution.
        bias: biases of the input and output projections.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for a size below 1.

    Differs from the paper: a masked token has step 0 and input 0, so that padding neither writes nor decays. ``A_log``, ``D``
    and the step's bias carry ``_no_weight_decay``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        state_dim: int = 16,
        expand: int = 2,
        conv_size: int = 4,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        for name, size in (("state_dim", state_dim), ("expand", expand), ("conv_size", conv_size), ("dt_rank", dt_rank)):
            if size is not None and size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = expand * dim
        self.state_dim, self.inner = state_dim, inner
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias, **place)
        self.conv = ShortConvolution(inner, conv_size, bias=conv_bias, **place)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * state_dim, bias=False, **place)
        self.dt_proj = nn.Linear(self.dt_rank, inner, bias=True, **place)
        states = torch.arange(1, state_dim + 1, **place).log()
        self.A_log = nn.Parameter(states.expand(inner, -1).clone())
        self.D = nn.Parameter(torch.ones(inner, **place))
        self.out_proj = nn.Linear(inner, dim, bias=bias, **place)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        low, high = math.log(dt_min), math.log(dt_max)
        step = torch.empty(inner, **place).uniform_(low, high).exp().clamp(min=dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + (-torch.expm1(-step)).log())  # the inverse of softplus
        for parameter in (self.A_log, self.D, self.dt_proj.bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """Zero states and an empty window."""
        ssm = torch.zeros(batch_size, self.inner, self.state_dim, device=device, dtype=accumulate_dtype(dtype))
        return State({"ssm": ssm, "window": self.conv.begin(batch_size, device, dtype)})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Convolve, scan, gate."""
        inner, z, delta, B, C, window = self._project(x, state["window"], mask)
        y, ssm = selective_scan(inner, delta, -self.A_log.exp(), B, C, D=self.D, initial_state=state["ssm"])
        self.emit("values", lambda: inner.transpose(1, 2).unsqueeze(-1))
        self.emit("mixed", lambda: y.transpose(1, 2).unsqueeze(-1))
        self.emit("delta", delta)
        return self.out_proj(y * F.silu(z)), State({"ssm": ssm, "window": window})

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What the scan makes of a unit impulse at each token, channel by channel (b, E, n, n)."""
        b, n = x.shape[:2]
        _, _, delta, B, C, _ = self._project(x, None, masks.query)
        impulses = torch.eye(n, device=x.device, dtype=x.dtype)[None, :, :, None].expand(b, n, n, self.inner)
        delta, B, C = (t.repeat_interleave(n, dim=0) for t in (delta, B, C))
        y = selective_scan(impulses.reshape(b * n, n, self.inner), delta, -self.A_log.exp(), B, C, D=self.D)[0]
        return y.view(b, n, n, self.inner).permute(0, 3, 2, 1)

    def _project(
        self, x: Tensor, window: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        inner, z = self.in_proj(x).chunk(2, dim=-1)
        if mask is not None:
            inner = inner.masked_fill(~mask.unsqueeze(-1), 0.0)  # with a bias the projection of a zero is not zero
        inner, window = self.conv(inner, window)
        inner = F.silu(inner)
        if mask is not None:
            inner = inner.masked_fill(~mask.unsqueeze(-1), 0.0)
        low_rank, B, C = self.x_proj(inner).split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        delta = F.softplus(self.dt_proj(low_rank))
        if mask is not None:
            delta = delta.masked_fill(~mask.unsqueeze(-1), 0.0)
        return inner, z, delta, B, C, window
