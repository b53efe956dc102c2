"""The selective scan: a diagonal state-space recurrence whose step, input map and output map depend on the token."""

from __future__ import annotations

import torch
from jaxtyping import Float, Inexact
from torch import Tensor
from torch.nn import functional as F

from attnlab.ops.backends import Op
from attnlab.ops.selective_scan import eager, reference

OP = Op("selective_scan", {"reference": reference.scan, "eager": eager.scan})
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
    r"""The recurrence of Mamba (Gu and Dao 2023, algorithm 2, S6), for n >= 1 tokens of e channels with s states each.

    With $\Delta_t = \delta_t + b_\delta$, or its softplus,

    $$h_t = e^{\Delta_t A} \odot h_{t-1} + \Delta_t u_t B_t \qquad y_t = \big(\langle C_t, h_t \rangle + D u_t\big)\,\mathrm{SiLU}(z_t)$$

    where $\odot$ and $\langle\cdot,\cdot\rangle$ are per channel over its states. Note $\Delta B$, not the exact $(e^{\Delta A} - 1)/A \cdot B$. With complex
    $A$, each state stands for a conjugate pair, and the output reads $2\,\mathrm{Re}\langle C_t, h_t \rangle$.

    ``extend`` of a stream is the same call: hand the last state on as ``initial_state``.

    Args:
        u: the inputs.
        delta: the steps, before bias and softplus.
        A: the rates, with negative real part for a stable recurrence; real or complex.
        B: how an input enters the states: (e s) constant, (b n s) per token, or (b n g s) per token and group, where g divides e and
            channel c is in group c // (e / g). Real or complex.
        C: how the states are read, in any of these layouts, not necessarily that of B.
        D: the skip, one weight a channel.
        z: the gate.
        delta_bias: added to ``delta`` before the softplus.
        delta_softplus: whether the steps are softplus'd.
        initial_state: $h_{-1}$, zeros if None.
        backend: "auto", "reference" or "eager".

    Returns:
        y in the dtype of ``u``, and the last state. The scan runs in the common dtype of all tensors but in no less than float32, and the
        state stays in that dtype (complex with complex A).

    Raises:
        TypeError: a dtype is not a floating one where it must be, or B, C or the state is complex and A is not.
        ValueError: a shape does not fit the others.
        BackendUnavailableError: an explicit ``backend`` cannot run here.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    dtype = torch.float32
    for tensor in (u, delta, A, B, C, D, z, delta_bias, initial_state):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    inputs, steps = u.to(real), delta.to(real)
    if delta_bias is not None:
        steps = steps + delta_bias
    if delta_softplus:
        steps = F.softplus(steps)
    if initial_state is None:
        initial_state = A.new_zeros(len(u), *A.shape, dtype=dtype)
    B, C = _weights(B, C)
    core = OP(backend, u)
    y, last = core(*(t.to(dtype) for t in (steps * inputs, steps, A, B, C, initial_state)))
    if dtype.is_complex:
        y = 2 * y.real
    if D is not None:
        y = torch.addcmul(y, D.to(real), inputs)
    if z is not None:
        y = y * F.silu(z.to(real))
    return y.to(u.dtype), last


def _weights(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C, each (e s) or (b n g s) with the same g."""
    B, C = (weights.unsqueeze(2) if weights.ndim == 3 else weights for weights in (B, C))
    if B.ndim == C.ndim == 4:
        groups = max(B.shape[2], C.shape[2])
        B, C = B.expand(-1, -1, groups, -1), C.expand(-1, -1, groups, -1)
    return B, C


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    """Raise for what `selective_scan` cannot take."""
    if u.ndim != 3 or u.shape[1] == 0:
        raise ValueError(f"u: expected (b, n, e) with n >= 1, got {tuple(u.shape)}")
    if A.ndim != 2:
        raise ValueError(f"A: expected (e, s), got {tuple(A.shape)}")
    batch, tokens, channels = u.shape
    states = A.shape[1]
    expected = {
        "delta": (delta, (batch, tokens, channels)),
        "A": (A, (channels, states)),
        "D": (D, (channels,)),
        "z": (z, (batch, tokens, channels)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, states)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape} to fit u {tuple(u.shape)} and A {tuple(A.shape)}, got {tuple(tensor.shape)}")
    real = {"u": u, "delta": delta, "D": D, "z": z, "delta_bias": delta_bias}
    for name, tensor in real.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    for name, tensor in {"A": A, "B": B, "C": C, "initial_state": initial_state}.items():
        if tensor is not None and not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"{name}: expected a floating or complex dtype, got {tensor.dtype}")
        if tensor is not None and tensor.is_complex() and not A.is_complex():
            raise TypeError(f"{name}: is {tensor.dtype} and A is {A.dtype}; make A complex too, then y reads twice the real part")
    for name, weights in {"B": B, "C": C}.items():
        _check_weights(name, weights, (batch, tokens, channels, states))
    groups = {weights.shape[2] for weights in (B, C) if weights.ndim == 4}
    if len(groups - {1}) > 1:
        raise ValueError(f"B, C: expected as many groups in both (or one), got {B.shape[2]} and {C.shape[2]}")


def _check_weights(name: str, weights: Tensor, sizes: tuple[int, int, int, int]) -> None:
    batch, tokens, channels, states = sizes
    shape = tuple(weights.shape)
    if shape in ((channels, states), (batch, tokens, states)):
        return
    if len(shape) == 4 and (*shape[:2], shape[3]) == (batch, tokens, states) and shape[2] > 0 and channels % shape[2] == 0:
        return
    raise ValueError(
        f"{name}: expected (e, s) = {(channels, states)}, (b, n, s) = {(batch, tokens, states)}, or (b, n, g, s) with g dividing "
        f"{channels}, got {shape}"
    )
