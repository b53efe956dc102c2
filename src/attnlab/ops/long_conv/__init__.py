r"""Long causal convolutions, a channel at a time, on sequences and on grids, in O(n log n) by Fourier transform.

On a grid causal is meant axis by axis: place $i$ reads the quadrant of the places that are behind it on every axis,

$$y_i = \sum_{0 \le a \le i} k_a\, x_{i-a} .$$

A filter is as large as the grid, so that every place behind is reached.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import Op, accumulate_dtype
from attnlab.ops.chunks import common_dtype
from attnlab.ops.long_conv import eager, reference

LONG_CONV = Op("long_conv", {"reference": reference.long_conv, "eager": eager.long_conv})

__all__ = ["LONG_CONV", "long_conv"]


def long_conv(
    x: Float[Tensor, "b c *grid"],
    kernel: Float[Tensor, "c *grid"],
    skip: Float[Tensor, " c"] | None = None,
    *,
    last: int | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b c ..."]:
    """Convolve every channel with its own filter.

    Args:
        x: inputs (b, c, *grid), with one side or more.
        kernel: k (c, *grid), first the place itself.
        skip: (c,), what is added of the input itself.
        last: only so many of the last places along the last axis are wanted, as by a stream; None for all.
        backend: "auto", "reference" (place by place) or "eager" (Fourier transform in float64; one place is a plain sum).

    Returns:
        (b, c, *grid), the last side ``last``, in the common dtype. By Fourier transform rounding errors reach earlier places,
        too, where a sum has none.

    Raises:
        TypeError: a tensor is not of a floating dtype.
        ValueError: a shape does not fit the others.
    """
    x, kernel = common_dtype(x=x, kernel=kernel)
    if x.dim() < 3 or 0 in x.shape or kernel.shape != x.shape[1:]:
        raise ValueError(f"x, kernel: expected (b, c, *grid) and (c, *grid), got {tuple(x.shape)} and {tuple(kernel.shape)}")
    if skip is not None and skip.shape != x.shape[1:2]:
        raise ValueError(f"skip: expected shape ({x.shape[1]},), got {tuple(skip.shape)}")
    last = x.shape[-1] if last is None else last
    if not 1 <= last <= x.shape[-1]:
        raise ValueError(f"last: expected 1 to {x.shape[-1]}, got {last}")
    sums = accumulate_dtype(x.dtype)
    y: Tensor = LONG_CONV(backend, x)(x.to(sums), kernel.to(sums), last)
    if skip is not None:
        weights = skip.to(sums).view(-1, *[1] * (x.dim() - 2))
        y = torch.addcmul(y, weights, x[..., x.shape[-1] - last :].to(sums))
    return y.to(x.dtype)
