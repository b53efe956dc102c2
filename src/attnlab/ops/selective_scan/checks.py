"""What the selective scan can take."""

from __future__ import annotations

from torch import Tensor


def check(
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
    """Raise ValueError or TypeError for what `selective_scan` cannot take; its arguments are described there."""
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
            raise ValueError(
                f"{name}: expected shape {shape} to fit u {tuple(u.shape)} and A {tuple(A.shape)}, got {tuple(tensor.shape)}"
            )
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
