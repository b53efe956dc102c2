"""S5: one diagonal state space with many inputs and many outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.info import Supports
from attnlab.core.state import State
from attnlab.mixers.parts.conjugate_pairs import as_complex
from attnlab.mixers.parts.linear_recurrence import linear_recurrence
from attnlab.mixers.recurrent.time_invariant import DISCRETIZATIONS, TimeInvariantSSM, discretized, initial_steps


@mixers.register(
    "s5",
    family="recurrent",
    paper="survey-mamba-medical",
    supports=Supports(causal="always", streaming=True, state="bounded", associative=True, cost=1.0),
    example={"state_dim": 4},
)
class S5(TimeInvariantSSM):
    r"""Diagonal state space of many inputs and outputs (Smith, Warrington, Linderman 2023, arXiv 2208.04933, section 3).

    With P complex states $h$ for all c channels, $\Lambda \in \mathbb{C}^P$, $B \in \mathbb{C}^{P \times c}$,
    $C \in \mathbb{C}^{c \times P}$, and a step a state,

    $$h_t = \bar\Lambda \odot h_{t-1} + \bar\beta \odot (B u_t), \quad v_t = \mathrm{GELU}(2\,\mathrm{Re}\, C h_t + D \odot u_t),
      \quad y_t = v_t \odot \sigma(W v_t)$$

    Time O(n P c), memory O(n (P + c)). State: ``ssm`` (b, P, 2). What multiplies an input is a c x c matrix for each pair of
    tokens, so there is no mixing matrix.

    A masked token is an input of 0, and takes a step: the states decay over it.

    Args:
        dim: width of the tokens, c.
        num_heads: of the common signature; the mechanism has no heads.
        causal: always True.
        state_dim: P, conjugate pairs.
        blocks: parts of the initial state matrix, each the normal part of HiPPO-LegS; a divisor of ``state_dim``.
        discretization: "zoh" or "bilinear".
        dt_min: the smallest initial step.
        dt_max: the largest initial step.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for a state_dim below 1, blocks that do not divide it, steps out of order, or an unknown ``discretization``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        state_dim: int = 64,
        blocks: int = 1,
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if state_dim < 1 or blocks < 1 or state_dim % blocks:
            raise ValueError(f"state_dim, blocks: expected positive, the second a divisor, got {state_dim} and {blocks}")
        if discretization not in DISCRETIZATIONS:
            raise ValueError(f"discretization: expected one of {DISCRETIZATIONS}, got {discretization!r}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.discretization = discretization
        rates, basis = _hippo_normal(state_dim // blocks)
        write = torch.randn(blocks, 2 * state_dim // blocks, dim) * dim**-0.5
        read = torch.randn(blocks, dim, 2 * state_dim // blocks) * state_dim**-0.5
        B = (basis.mH @ write.to(basis.dtype)).flatten(0, 1)
        C = (read.to(basis.dtype) @ basis).transpose(0, 1).flatten(1)
        stored: dict[str, Any] = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.A_log = nn.Parameter((-rates.real).log().repeat(blocks).to(**stored))
        self.A_imag = nn.Parameter(rates.imag.repeat(blocks).to(**stored))
        self.log_step = nn.Parameter(initial_steps((state_dim,), dt_min, dt_max, **place))
        self.B = nn.Parameter(torch.view_as_real(B).to(**stored))
        self.C = nn.Parameter(torch.view_as_real(C).to(**stored))
        self.D = nn.Parameter(torch.randn(dim, **place))
        self.gate = nn.Linear(dim, dim, **place)

    def discrete(self) -> tuple[Complex[Tensor, "p"], Complex[Tensor, "p"]]:
        """See `TimeInvariantSSM`."""
        rates = as_complex(torch.stack((-self.A_log.exp(), self.A_imag), -1))
        return discretized(rates, self.log_step.exp().to(rates.real.dtype), self.discretization)

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Write, carry on, read, gate."""
        log_decay, write = self.discrete()
        weights = write.unsqueeze(-1) * as_complex(self.B)
        inputs = x.to(weights.real.dtype) @ torch.cat((weights.real, weights.imag)).mT
        inputs = as_complex(torch.stack(inputs.chunk(2, -1), -1))
        states = linear_recurrence(inputs, log_decay.exp(), as_complex(state["ssm"]))
        read = as_complex(self.C)
        v = 2 * torch.cat((states.real, -states.imag), -1) @ torch.cat((read.real, read.imag), -1).mT
        v = F.gelu(v.to(x.dtype) + self.D * x)
        return v * torch.sigmoid(self.gate(v)), state.replace(ssm=torch.view_as_real(states[:, -1].clone()))


def _hippo_normal(pairs: int) -> tuple[Complex[Tensor, "p"], Complex[Tensor, "q p"]]:
    r"""Eigenvalues above the real axis, and eigenvectors, of the normal part of HiPPO-LegS on 2 p states.

    It is $-\frac12 I + S$ with $S_{nk} = -\sqrt{(n + 1/2)(k + 1/2)}$ below the diagonal and the opposite above.
    """
    root = (torch.arange(2 * pairs, dtype=torch.float64) + 0.5).sqrt()
    product = torch.outer(root, root)
    skew = product.triu(1) - product.tril(-1)
    frequency, vectors = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    return torch.complex(torch.full((pairs,), -0.5, dtype=torch.float64), frequency[pairs:]), vectors[:, pairs:]
