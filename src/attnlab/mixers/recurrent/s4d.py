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
from attnlab.ops.selective_scan import selective_scan
from attnlab.ops.toeplitz import toeplitz_matmul

INITIAL_RATES = ("lin", "inv", "real")


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
    transform: time O(c n (N + log n)), memory O(c n). A piece of a stream is scanned from the states ``ssm`` (b, c, N, 2), in
    time O(n c N). Mixing matrix and dynamics have c "heads", the channels, with D on the diagonal; values are the inputs.

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
        """K, without D, in float64: powers of the states are products of those within and between pieces of sqrt(n)."""
        log_decay, write = (t.to(torch.complex128) for t in self.discrete())
        side = math.isqrt(n - 1) + 1
        steps = torch.arange(side, device=log_decay.device, dtype=torch.float64)[:, None]
        within = (steps * log_decay.unsqueeze(1)).exp()
        between = as_complex(self.C.double()).mul(write).unsqueeze(1) * (side * steps * log_decay.unsqueeze(1)).exp()
        real = torch.cat((between.real, -between.imag), -1) @ torch.cat((within.real, within.imag), -1).mT
        return 2 * real.flatten(1)[:, :n]

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """A whole sequence: the convolution."""
        n, u = x.shape[1], x.transpose(1, 2).unsqueeze(-1)
        table = F.pad(self.kernel(n).flip(-1), (0, n - 1))
        v = toeplitz_matmul(table, u.double(), causal=True).squeeze(-1).mT.to(x.dtype)
        return self._finish(x, v + self.D * x)

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """A piece: the recurrence from the states on."""
        log_decay, write = self.discrete()
        before = as_complex(state["ssm"])
        v, after = selective_scan(x, torch.ones_like(x), log_decay, write, as_complex(self.C), D=self.D, initial_state=before)
        return self._finish(x, v), state.replace(ssm=torch.view_as_real(after))

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
