"""Linear attention with Toeplitz weights by Fourier transform, a few columns at a time, in both directions.

A column is a pair of feature and value channel. The table, its rows reversed, is a signal s with
$y_i = (s * x)_{m-1+i}$; a circle of at least n + m - 1 places keeps what wraps around out of the places that are read.
Transforms run in float64: their rounding errors are relative to the largest terms of all rows, so that in float32 a row whose
own terms are small, such as the first of a causal sequence, would lose what a sum of those terms has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from attnlab.ops.chunks import full_precision

BLOCK = 2**20
"""Numbers of a block of columns before its transform, all examples and heads together, where they are not more anyway."""


def attend(
    table: Float[Tensor, "h r"], q: Float[Tensor, "b h n f"], k: Float[Tensor, "b h m f"], v: Float[Tensor, "b h m e"]
) -> Float[Tensor, "b h n e"]:
    """See `reference.attend`. Backward is not differentiable again."""
    return _forward(table, q, k, v)


def circle(needed: int) -> int:
    """A length that transforms fast, at least ``needed``: a power of 2, or 5/8, 9/16 or 3/4 of one."""
    power = max(16, 1 << (needed - 1).bit_length())
    return min(size for size in (power * 9 // 16, power * 5 // 8, power * 3 // 4, power) if size >= needed)


def _blocks(q: Tensor, v: Tensor, length: int) -> tuple[list[slice], list[slice]]:
    """Blocks of features and of value channels; a column block is a pair of them."""
    features, channels = q.shape[-1], v.shape[-1]
    room = max(1, BLOCK // (q.shape[0] * q.shape[1] * length))
    wide = min(channels, room)
    deep = max(1, room // wide)
    return [slice(i, i + deep) for i in range(0, features, deep)], [slice(i, i + wide) for i in range(0, channels, wide)]


def _rows(x: Float[Tensor, "b h n f"], features: slice) -> Float[Tensor, "b h s n"]:
    """Some features, their tokens side by side."""
    return x[..., features].mT.contiguous()


def _transform(x: Float[Tensor, "*s n"], length: int, first: int = 0) -> Complex[Tensor, "*s w"]:
    """The spectrum of rows that begin at place ``first`` of a circle."""
    return torch.fft.rfft(F.pad(x.double(), (first, length - first - x.shape[-1])))


def _signal(spectrum: Complex[Tensor, "*s w"], length: int, places: slice, dtype: torch.dtype) -> Float[Tensor, "*s n"]:
    """Some places of the circle that a spectrum belongs to."""
    return torch.fft.irfft(spectrum, length)[..., places].to(dtype)


def _outer(a: Float[Tensor, "b h f n"], b: Float[Tensor, "b h e n"]) -> Float[Tensor, "b h f e n"]:
    """The columns of a block."""
    return a.unsqueeze(3) * b.unsqueeze(2)


@torch.library.custom_op(
    "attnlab::toeplitz_forward", mutates_args=(), schema="(Tensor table, Tensor q, Tensor k, Tensor v) -> Tensor"
)
@full_precision
def _forward(table: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, m = q.shape[2], k.shape[2]
    length = circle(n + m - 1)
    kernel = _transform(table.flip(-1), length)[:, None, None]
    rows_v = v.mT.contiguous()
    out = v.new_zeros(*rows_v.shape[:3], n)
    features, channels = _blocks(q, v, length)
    for feature in features:
        rows_q, rows_k = _rows(q, feature), _rows(k, feature)
        for channel in channels:
            spectrum = _transform(_outer(rows_k, rows_v[:, :, channel]), length).mul_(kernel)
            mixed = _signal(spectrum, length, slice(m - 1, m - 1 + n), v.dtype)
            out[:, :, channel] += (mixed * rows_q.unsqueeze(3)).sum(2)
    return out.mT.contiguous()


@torch.library.custom_op(
    "attnlab::toeplitz_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor table, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor, Tensor)",
)
@full_precision
def _backward(grad: Tensor, table: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of table, q, k and v."""
    n, m = q.shape[2], k.shape[2]
    length = circle(n + m - 1)
    kernel = _transform(table.flip(-1), length)[:, None, None]
    rows_v, rows_grad = v.mT.contiguous(), grad.mT.contiguous()
    to_q, to_k, to_v = q.new_zeros(q.shape), k.new_zeros(k.shape), torch.zeros_like(rows_v)
    to_kernel = torch.zeros_like(kernel[:, 0, 0])
    features, channels = _blocks(q, v, length)
    for feature in features:
        rows_q, rows_k = _rows(q, feature), _rows(k, feature)
        for channel in channels:
            below = _transform(_outer(rows_k, rows_v[:, :, channel]), length)
            above = _transform(_outer(rows_q, rows_grad[:, :, channel]), length, first=m - 1)
            to_kernel += torch.einsum("bhfew,bhfew->hw", above, below.conj())
            mixed = _signal(below.mul_(kernel), length, slice(m - 1, m - 1 + n), v.dtype)
            to_q[..., feature] += (mixed * rows_grad[:, :, None, channel]).sum(3).mT
            back = _signal(above.mul_(kernel.conj()), length, slice(m), v.dtype)
            to_k[..., feature] += (back * rows_v[:, :, None, channel]).sum(3).mT
            to_v[:, :, channel] += (back * rows_k.unsqueeze(3)).sum(2)
    to_table = _signal(to_kernel, length, slice(n + m - 1), table.dtype).flip(-1)
    return to_table, to_q, to_k, to_v.mT.contiguous()


@_forward.register_fake
def _(table: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[3])


@_backward.register_fake
def _(grad: Tensor, table: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return table.new_empty(table.shape), q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)
