"""Mamba: a diagonal state-space recurrence whose step, input and output maps depend on the token."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.dynamics import Dynamics
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.parts.selective_ssm import SELECTIVE, SelectiveSSM
from attnlab.mixers.parts.short_convolution import ShortConvolution


@mixers.register(
    "mamba",
    family="recurrent",
    paper="mamba",
    supports=Supports(
        causal="always", streaming=True, mixing_matrix=True, state="bounded", associative=True, dynamics=True, cost=1.0
    ),
    example={"state_dim": 4},
)
class Mamba(StreamingMixer):
    r"""Selective state space (Gu and Dao 2023, algorithm 2 and section 3.4), in its gated block.

    With E = expand * dim inner channels and N states a channel, $x, z = W_{in} u$, x through a short causal convolution and SiLU,
    $(\delta, B, C) = W_x x$ and $\Delta = \mathrm{softplus}(W_\Delta \delta + b)$:

    $$h_t = e^{\Delta_t A} \odot h_{t-1} + \Delta_t B_t x_t, \qquad y_t = C_t^\top h_t + D x_t, \qquad
      o_t = W_{out} (y_t \odot \mathrm{SiLU}(z_t))$$

    A = -exp(A_log) is diagonal, zero-order hold for A and the simplified (Euler) rule for B. Time O(n E N), memory O(n E): no
    n x E x N tensor. State: ``ssm`` (b, E, N) in float32 or wider and ``window`` (b, w - 1, E). Mixing matrix and dynamics have
    E "heads", the inner channels, with D on the diagonal; values are the convolved x.

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
        dt_init: of the map from delta to steps: "random", within +- dt_scale dt_rank^(-1/2), or "constant", at that bound.
        dt_scale: see there.
        dt_init_floor: a bound below the initial steps.
        groups: sets of neighbouring inner channels, each with B and C of its own.
        complex_states: A begins at -1/2 + i pi n in place of -(n + 1); a state stands for a conjugate pair, and is held as two
            numbers, (b, E, N, 2).
        selective: which of "delta", "B" and "C" depend on the token; the others are parameters (the ablation of table 6).
        skip: whether D is there.
        conv_bias: bias of the convolution.
        bias: biases of the input and output projections.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for a size below 1, groups that do not divide E, or an unknown ``dt_init`` or name in ``selective``.

    Differs from the paper: a masked token has step 0 and input 0, so that padding neither writes nor decays; the convolution has
    a zero in its place. ``A_log``, ``D`` and the step's bias carry ``_no_weight_decay``. That ``out_proj`` begins smaller in a
    deep model, by 1 / sqrt(layers), is the model's.
    """

    memory = ("ssm",)

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
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        groups: int = 1,
        complex_states: bool = False,
        selective: Collection[str] = SELECTIVE,
        skip: bool = True,
        conv_bias: bool = True,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        for name, size in (("expand", expand), ("conv_size", conv_size)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = expand * dim
        self.lookback = conv_size - 1
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias, **place)
        self.conv = ShortConvolution(inner, conv_size, bias=conv_bias, **place)
        if self.conv.bias is not None:
            nn.init.uniform_(self.conv.bias, -(conv_size**-0.5), conv_size**-0.5)
        self.ssm = SelectiveSSM(
            inner,
            state_dim,
            math.ceil(dim / 16) if dt_rank is None else dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init=dt_init,
            dt_scale=dt_scale,
            dt_init_floor=dt_init_floor,
            groups=groups,
            complex_states=complex_states,
            selective=selective,
            skip=skip,
            **place,
        )
        self.out_proj = nn.Linear(inner, dim, bias=bias, **place)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """Zero states and an empty window."""
        ssm = self.ssm.begin(batch_size, device, dtype)
        return State({"ssm": ssm, "window": self.conv.begin(batch_size, device, dtype)})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Convolve, scan, gate."""
        inner, z, window = self._project(x, state["window"], mask)
        y, ssm = self.ssm(inner, state["ssm"], mask)
        self.emit("values", lambda: inner.transpose(1, 2).unsqueeze(-1))
        self.emit("mixed", lambda: y.transpose(1, 2).unsqueeze(-1))
        self.emit("delta", lambda: self.ssm.coefficients(inner, mask)[0])
        return self.out_proj(y * F.silu(z)), State({"ssm": ssm, "window": window})

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """Of the scan, channel by channel (b, E, n, n)."""
        return self.ssm.matrix(self._project(x, None, masks.query)[0], masks.query)

    def digest(self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None) -> State:
        """The states from zero, and the decay of earlier ones over the piece: ``carry``, shaped like ``ssm``."""
        ssm, carry = self.ssm.digest(self._project(x, state["window"], mask)[0], mask)
        return State({"ssm": ssm, "carry": carry})

    def fold(self, earlier: State, later: State) -> dict[str, Tensor]:
        """What the later piece leaves of the earlier states, and its own; decays multiply."""
        carried = {"carry": self.ssm.scaled(earlier["carry"], later["carry"])} if "carry" in earlier else {}
        return {"ssm": self.ssm.scaled(earlier["ssm"], later["carry"]) + later["ssm"], **carried}

    def recurrence(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        """Of the scan; memory O(n E N)."""
        return self.ssm.recurrence(self._project(x, None, mask)[0], mask)

    def _project(self, x: Tensor, window: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What is scanned, the gate before its activation, and the last inputs of the convolution."""
        inner, z = self.in_proj(x).chunk(2, dim=-1)
        inner = zero_masked(inner, mask)  # with a bias the projection of a zero is not zero
        inner, window = self.conv(inner, window)
        return zero_masked(F.silu(inner), mask), z, window
