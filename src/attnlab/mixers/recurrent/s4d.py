"""S4D: a diagonal state space of its own for each channel, a long convolution at once and a recurrence in a stream."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.dynamics import Dynamics
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.mixers.parts.conjugate_pairs import as_complex, pair_dynamics
from attnlab.mixers.recurrent.time_invariant import DISCRETIZATIONS, TimeInvariantSSM, discretized, initial_steps
from attnlab.ops.toeplitz import toeplitz_matmul

INITIAL_RATES = ("lin", "inv", "real")
Powers = tuple[Complex[Tensor, "c p s"], Complex[Tensor, "c p s"]]
"""What p tokens leave of a state, and p times about sqrt(n) tokens: the powers up to n are products of one of each."""


@mixers.register(
    "s4d",
    family="recurrent",
    paper="survey-mamba-medical",
    supports=Supports(
        causal="always", streaming=True, mixing_matrix=True, state="bounded", associative=True, dynamics=True, cost=1.0
    ),
    example={"state_dim": 4},
)
class S4D(TimeInvariantSSM):
    r"""Diagonal time-invariant state space (Gu, Gupta, Goel, Re 2022, arXiv 2206.11893, sections 3 and 4).

    For each of c channels N complex states, $A = -e^{a} + i\omega$, step $\Delta = e^{\delta}$ and B = 1,

    $$h_t = \bar A \odot h_{t-1} + \bar B u_t, \quad v_t = 2\,\mathrm{Re}\, C^\top h_t + D u_t, \quad
      y = \mathrm{GLU}(W\, \mathrm{GELU}(v) + b)$$

    A whole sequence is a convolution, $v = K * u + D u$ with $K_l = 2\,\mathrm{Re} \sum_n C_n \bar B_n \bar A_n^l$, by Fourier
    transform: time O(c n (N + log n)), memory O(c (n + sqrt(n) N)); so is a piece of a stream, which goes on from the states
    ``ssm`` (b, c, N, 2), and a single token is a step of the recurrence. Mixing matrix and dynamics have c "heads", the channels,
    with D on the diagonal; values are the inputs.

    A masked token is an input of 0, and takes a step: the states decay over it.

    Args:
        dim: width of the tokens, c.
        num_heads: of the common signature; the mechanism has no heads.
        causal: always True.
        state_dim: N, conjugate pairs.
        init: of A: "lin", $-1/2 + i \pi n$; "inv", $-1/2 + i (2N/\pi) (2N / (2n + 1) - 1)$; "real", $-(n + 1)$.
        discretization: "zoh" or "bilinear".
        dt_min: the smallest initial step.
        dt_max: the largest initial step.
        glu: the gated linear map behind the state space; without it y = W GELU(v) + b.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for a state_dim below 1, steps out of order, or an unknown ``init`` or ``discretization``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        state_dim: int = 32,
        init: str = "lin",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        glu: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if state_dim < 1:
            raise ValueError(f"state_dim: expected at least 1, got {state_dim}")
        if init not in INITIAL_RATES:
            raise ValueError(f"init: expected one of {INITIAL_RATES}, got {init!r}")
        if discretization not in DISCRETIZATIONS:
            raise ValueError(f"discretization: expected one of {DISCRETIZATIONS}, got {discretization!r}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        n, whole = torch.arange(0.0, state_dim, **place).expand(dim, -1), 2 * state_dim
        frequency = {"lin": math.pi * n, "inv": whole / math.pi * (whole / (2 * n + 1) - 1), "real": torch.zeros_like(n)}[init]
        self.discretization = discretization
        self.A_log = nn.Parameter((n + 1).log() if init == "real" else torch.full_like(n, math.log(0.5)))
        self.A_imag = nn.Parameter(frequency.clone())
        self.log_step = nn.Parameter(initial_steps((dim, 1), dt_min, dt_max, **place))
        self.C = nn.Parameter(torch.randn(dim, state_dim, 2, **place) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(dim, **place))
        self.out_proj = nn.Linear(dim, 2 * dim if glu else dim, **place)
        self.glu = glu

    def discrete(self) -> tuple[Complex[Tensor, "c s"], Complex[Tensor, "c s"]]:
        """See `TimeInvariantSSM`."""
        rates = as_complex(torch.stack((-self.A_log.exp(), self.A_imag), -1))
        return discretized(rates, self.log_step.exp().to(rates.real.dtype), self.discretization)

    def kernel(self, n: int) -> Float[Tensor, "c n"]:
        """K, without D, in float64."""
        return self._kernel(self._powers(n), n)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """A whole sequence: the convolution."""
        return self._finish(x, self._convolve(x, self._powers(x.shape[1])).to(x.dtype) + self.D * x)

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """A token: a step of the recurrence. More: the convolution, what is left of the states, and what is left behind."""
        n = x.shape[1]
        log_decay, write = self.discrete()
        before, read = as_complex(state["ssm"]), as_complex(self.C)
        if n == 1:
            after = log_decay.exp() * before + write * x.transpose(1, 2)
            v = 2 * (read * after).sum(-1).real.unsqueeze(1)
        else:
            powers = self._powers(n)
            v = self._convolve(x, powers) + _response(read * before * log_decay.exp(), powers, n).mT
            after = (log_decay * n).exp() * before + write * _gathered(x, powers)
        v = v.to(x.dtype) + self.D * x
        return self._finish(x, v), state.replace(ssm=torch.view_as_real(after.to(before.dtype)))

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The kernel by distance, (b, c, n, n), the same for every example but for masked tokens."""
        n = x.shape[1]
        places = torch.arange(n, device=x.device)
        distance = places[:, None] - places
        kernel = self.kernel(n).to(x.dtype)[:, distance.clamp(min=0)].masked_fill(distance < 0, 0.0)
        matrix = (kernel + torch.diag_embed(self.D[:, None].expand(-1, n))).expand(x.shape[0], -1, -1, -1)
        return matrix if masks.key is None else matrix.masked_fill(~masks.key[:, None, None], 0.0)

    def recurrence(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        """Two real states for each complex one; nothing is written at masked tokens."""
        b, n, _ = x.shape
        log_decay, write = self.discrete()
        shape = (b, self.dim, n, log_decay.shape[-1])
        decay, write, read = (t[None, :, None].expand(shape) for t in (log_decay.exp(), write, as_complex(self.C)))
        skip = self.D[:, None].expand(b, -1, n)
        if mask is not None:
            write, skip = write.masked_fill(~mask[:, None, :, None], 0.0), skip.masked_fill(~mask[:, None], 0.0)
        return pair_dynamics(decay, write, read, skip)

    def _finish(self, x: Tensor, v: Tensor) -> Float[Tensor, "b n c"]:
        self.emit("values", lambda: x.transpose(1, 2).unsqueeze(-1))
        self.emit("mixed", lambda: v.transpose(1, 2).unsqueeze(-1))
        y = self.out_proj(F.gelu(v))
        return F.glu(y, dim=-1) if self.glu else y

    def _powers(self, n: int) -> Powers:
        side = math.isqrt(n - 1) + 1
        log_decay = self.discrete()[0].to(torch.complex128).unsqueeze(1)
        steps = torch.arange(side, device=log_decay.device, dtype=torch.float64)[:, None]
        return (steps * log_decay).exp(), (side * steps * log_decay).exp()

    def _kernel(self, powers: Powers, n: int) -> Float[Tensor, "c n"]:
        return _response(as_complex(self.C.double()) * self.discrete()[1], powers, n)

    def _convolve(self, x: Float[Tensor, "b n c"], powers: Powers) -> Float[Tensor, "b n c"]:
        n = x.shape[1]
        table = F.pad(self._kernel(powers, n).flip(-1), (0, n - 1))
        return toeplitz_matmul(table, x.double().transpose(1, 2).unsqueeze(-1), causal=True).squeeze(-1).mT


def _response(weights: Complex[Tensor, "*b c s"], powers: Powers, n: int) -> Float[Tensor, "*b c n"]:
    r"""$2\,\mathrm{Re} \sum_s w_s \bar A_s^l$ for l = 0..n-1, without the powers of all l in memory."""
    within, between = powers
    left = weights.unsqueeze(-2) * between
    return 2 * (torch.cat((left.real, -left.imag), -1) @ torch.cat((within.real, within.imag), -1).mT).flatten(-2)[..., :n]


def _gathered(x: Float[Tensor, "b n c"], powers: Powers) -> Complex[Tensor, "b c s"]:
    r"""$\sum_j \bar A^{n-1-j} x_j$, likewise."""
    within, between = powers
    side = within.shape[1]
    latest = F.pad(x.double().flip(1), (0, 0, 0, side * side - x.shape[1])).transpose(1, 2).unflatten(-1, (side, side))
    parts = latest @ torch.cat((within.real, within.imag), -1)
    return (as_complex(torch.stack(parts.chunk(2, -1), -1)) * between).sum(-2)
