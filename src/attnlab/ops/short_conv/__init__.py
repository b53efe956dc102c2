"""Short causal depthwise convolution with a streaming state, as recurrent mixers place it before their recurrence."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import Op, accumulate_dtype
from attnlab.ops.chunks import common_dtype
from attnlab.ops.short_conv import eager, reference

OP = Op("short_conv", {"reference": reference.convolve, "eager": eager.convolve})
"""The implementations, which take inputs with the state already in front of them."""


def short_conv(
    x: Float[Tensor, "b n c"],
    weight: Float[Tensor, "c w"],
    bias: Float[Tensor, "c"] | None = None,
    *,
    state: Float[Tensor, "b w1 c"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b w1 c"]]:
    r"""Each channel of n >= 1 tokens convolved with its own w taps, the last on the current token; no activation.

    $$y_t = \beta + \sum_{k=0}^{w-1} W_k \odot x_{t-(w-1)+k}$$

    where $x_{-1}, x_{-2}, \dots$ are the state: a stream goes on by handing the new state on. This is the convolution of Mamba
    (Gu and Dao 2023, section 3.4) and of the linear-time mechanisms after it.

    Args:
        x: the inputs.
        weight: the taps, oldest first.
        bias: $\beta$.
        state: the last w - 1 inputs before ``x``, zeros if None.
        backend: "auto", "reference" or "eager".

    Returns:
        The outputs and the last w - 1 inputs, both in the common dtype of all tensors; sums run in no less than float32.

    Raises:
        TypeError: a tensor is not of a floating dtype.
        ValueError: a shape does not fit the others.
        BackendUnavailableError: an explicit ``backend`` cannot run here.
    """
    _check(x, weight, bias, state)
    if state is None:
        state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    optional = {} if bias is None else {"bias": bias}
    x, state, weight, *biases = common_dtype(x=x, state=state, weight=weight, **optional)
    padded = torch.cat([state, x], 1)
    sums = accumulate_dtype(x.dtype)
    y = OP(backend, x)(padded.to(sums), weight.to(sums), biases[0].to(sums) if biases else None)
    return y.to(x.dtype), padded[:, x.shape[1] :].clone()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> None:
    """Raise for what `short_conv` cannot take."""
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"x: expected (b, n, c) with n >= 1, got {tuple(x.shape)}")
    batch, _, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        raise ValueError(f"weight: expected ({channels}, w) with w >= 1 for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    expected = {"bias": (bias, (channels,)), "state": (state, (batch, weight.shape[1] - 1, channels))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            fit = f"x {tuple(x.shape)} and weight {tuple(weight.shape)}"
            raise ValueError(f"{name}: expected shape {shape} to fit {fit}, got {tuple(tensor.shape)}")
