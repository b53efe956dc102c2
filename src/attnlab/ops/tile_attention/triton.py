"""Tile attention on a GPU: nothing is gathered in memory, forward by an online softmax, backward by adding up atomically.

Sums are float32; the order in which a key's gradients are added is not fixed, so their last digits are not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnlab.ops.chunks import full_precision
from attnlab.ops.tile_attention import kernels
from attnlab.ops.tile_attention.inputs import Given, Inputs
from attnlab.ops.triton_launch import dot_precision, on_device, packed, power_of_two

BLOCK = 64
"""Queries of a program, and keys of a step, at most; half as many where products do not run on tensor cores."""


def _shared(inputs: Inputs) -> tuple[list[Any], list[int], dict[str, Any], tuple[int, int]]:
    """Tensors, strides and options that both kernels take, and their grid."""
    q, k, v, queries, keys, bias, kind, key_mask, causal, zero_outside, _ = inputs
    (b, h, _, d), (x, y) = q.shape, (queries.shape[3], keys.shape[3])
    real = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    bias = None if bias is None else bias.contiguous()
    tensors = [q, k, v, queries.contiguous(), keys.contiguous(), bias, kind, real]
    strides = [stride for t in (q, k, v) for stride in t.stride()[:3]]
    for index in (queries, keys):
        places = index.shape[2] * index.shape[3]
        strides += [index.shape[1] * places if index.shape[0] > 1 else 0, places if index.shape[1] > 1 else 0]
    strides.append(0 if bias is None or bias.shape[0] == 1 else bias.shape[1] * x * y)
    widest = BLOCK // 2 if q.dtype == torch.float32 else BLOCK
    block = min(widest, power_of_two(x, 16))
    options = {
        "CAUSAL": causal,
        "ZERO_OUTSIDE": zero_outside,
        "HAS_BIAS": bias is not None,
        "HAS_MASK": real is not None,
        "PRECISION": dot_precision(q),
        "BX": block,
        "BY": min(widest, power_of_two(y, 16)),
        "BD": power_of_two(d, 16),
        "BE": power_of_two(v.shape[3], 16),
    }
    return tensors, strides, options, (b * h * queries.shape[2], -(-x // block))


def _packed(inputs: Inputs) -> Inputs:
    return inputs._replace(q=packed(inputs.q), k=packed(inputs.k), v=packed(inputs.v))


@full_precision
def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of every tile."""
    inputs = _packed(inputs)
    q, k, v, queries, keys = inputs[:5]
    tensors, strides, options, grid = _shared(inputs)
    shape = (*q.shape[:2], *queries.shape[2:])
    out, lse = q.new_empty(*shape, v.shape[3]), q.new_empty(shape, dtype=torch.float32)
    sizes = [q.shape[1], q.shape[1] // k.shape[1], queries.shape[2], queries.shape[3], keys.shape[3], k.shape[2]]
    widths = [q.shape[3], v.shape[3], inputs.scale]
    with on_device(q):
        kernels._attend_tiles[grid](*tensors, out, lse, *strides, *sizes, *widths, **options)
    return out, lse


@full_precision
def backward(inputs: Inputs, given: Given, to_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the bias (empty without ``to_bias``)."""
    inputs = _packed(inputs)
    q, k, v, queries, keys, bias = inputs[:6]
    out, lse, dout, dlse = given
    tensors, strides, options, grid = _shared(inputs)
    dout = dout.contiguous()
    inner = ((dout.float() * out.float()).sum(-1) - dlse).masked_fill(lse == float("-inf"), 0.0).contiguous()
    dq, dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (q, k, v))
    wanted = to_bias and bias is not None
    dbias = torch.zeros(bias.shape if wanted and bias is not None else (0,), dtype=torch.float32, device=q.device)
    sizes = [q.shape[1], q.shape[1] // k.shape[1], queries.shape[2], queries.shape[3], keys.shape[3], q.shape[2], k.shape[2]]
    widths = [q.shape[3], v.shape[3], inputs.scale]
    with on_device(q):
        kernels._differentiate_tiles[grid](
            *tensors, lse.contiguous(), inner, dout, dq, dk, dv, dbias, *strides, *sizes, *widths,
            TO_BIAS=wanted, **options,
        )  # fmt: skip
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias if bias is None else dbias.to(bias.dtype)
