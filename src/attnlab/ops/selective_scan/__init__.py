"""The selective scan: a diagonal state-space recurrence whose step, input map and output map depend on the token."""

from __future__ import annotations

import torch
from jaxtyping import Float, Inexact
from torch import Tensor
from torch.nn import functional as F

from attnlab.ops.backends import Op
from attnlab.ops.selective_scan import eager, reference
from attnlab.ops.selective_scan.checks import check
from attnlab.ops.triton_launch import UNTRIED, limits

OP = Op(
    "selective_scan",
    {"reference": reference.scan, "eager": eager.scan, "triton": "attnlab.ops.selective_scan.triton:scan"},
    limits={"triton": limits((torch.float32,))},
    untried={"triton": UNTRIED},
)
"""The implementations of the core recurrence; what is pointwise is done here, for all of them."""


def selective_scan(
    u: Float[Tensor, "b n e"],
    delta: Float[Tensor, "b n e"],
    A: Inexact[Tensor, "e s"],
    B: Inexact[Tensor, "..."],
    C: Inexact[Tensor, "..."],
    *,
    D: Float[Tensor, "e"] | None = None,
    z: Float[Tensor, "b n e"] | None = None,
    delta_bias: Float[Tensor, "e"] | None = None,
    delta_softplus: bool = False,
    initial_state: Inexact[Tensor, "b e s"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b n e"], Inexact[Tensor, "b e s"]]:
    r"""The recurrence of Mamba (Gu and Dao 2023, algorithm 2, S6) on n >= 1 tokens of e channels with s states each.

    With $\Delta_t = \delta_t + b_\delta$, or its softplus, and per channel

    $$h_t = e^{\Delta_t A} h_{t-1} + \Delta_t u_t B_t \qquad y_t = (\langle C_t, h_t \rangle + D u_t)\,\mathrm{SiLU}(z_t)$$

    (the simplified $\Delta B$ of the authors' code, not $(e^{\Delta A} - 1) A^{-1} B$). With complex $A$ a state stands for a
    conjugate pair, and y reads $2\,\mathrm{Re}\langle C_t, h_t \rangle$. A stream goes on by handing the last state on.

    Args:
        u: the inputs.
        delta: the steps, before bias and softplus.
        A: the rates, real or complex; the recurrence is stable where their real part is negative.
        B: how an input enters the states: (e s) constant, (b n s) per token, or (b n g s) per token and group of channels, where
            g divides e and channel c is in group c // (e / g). Real, or complex where ``A`` is.
        C: how the states are read, in any of these layouts, not necessarily that of ``B``.
        D: the skip, one weight a channel.
        z: the gate.
        delta_bias: added to ``delta`` before the softplus.
        delta_softplus: whether the steps are softplus'd.
        initial_state: $h_{-1}$, zeros if None.
        backend: "auto", "reference", "eager", or "triton" (on a GPU, where the scan runs in float32).

    Returns:
        y in the dtype of ``u``, and the last state, which stays in the dtype that the scan runs in: the common one of all
        tensors, but no less than float32.

    Raises:
        TypeError: a dtype that is not floating, or B, C or the state complex and A not.
        ValueError: a shape that does not fit the others.
        BackendUnavailableError: an explicit ``backend`` cannot run here.
    """
    check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    dtype = torch.float32
    for tensor in (u, delta, A, B, C, D, z, delta_bias, initial_state):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    inputs, steps = _real(dtype, u), _real(dtype, delta)
    if delta_bias is not None:
        steps = steps + delta_bias
    if delta_softplus:
        steps = F.softplus(steps)
    if initial_state is None:
        initial_state = A.new_zeros(len(u), *A.shape)
    core = [tensor.to(dtype) for tensor in (steps * inputs, steps, A, *_same_layout(B, C), initial_state)]
    y, last = OP(backend, core[0])(*core)
    return _read_out(y, inputs, D, z).to(u.dtype), last


def _real(dtype: torch.dtype, x: Tensor) -> Tensor:
    """``x`` in the precision of ``dtype``, real also where that is complex."""
    return x.to(torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32)


def _read_out(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """The real output with skip and gate."""
    if y.is_complex():
        y = 2 * y.real
    if D is not None:
        y = torch.addcmul(y, D.to(y.dtype), u)
    return y if z is None else y * F.silu(z.to(y.dtype))


def _same_layout(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C, each (e s) or (b n g s) with the same g."""
    B, C = (weights.unsqueeze(2) if weights.ndim == 3 else weights for weights in (B, C))
    if B.ndim == C.ndim == 4:
        groups = max(B.shape[2], C.shape[2])
        B, C = B.expand(-1, -1, groups, -1), C.expand(-1, -1, groups, -1)
    return B, C
