"""Causal attention with its log-sum-exp on PyTorch's fused CPU kernel, which skips the pairs of the future.

The kernel's backward takes no gradient of the log-sum-exp, which enters the logits' gradients as one number a query, dlse:

    dS_ij = P_ij (dO_i . v_j - delta_i),  delta_i = dO_i . o_i - dlse_i .

One more column brings it in. There the values are 0, the output is -1 and its gradient is dlse, so that the kernel's own delta,
the product of output and gradient, is this one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import full_precision

INF = float("inf")
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _by_token(x: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for (b, h, n, width), tokens outermost, as projections of tokens have it."""
    b, h, n = x.shape[:3]
    return x.new_empty((b, n, h, width), dtype=dtype).transpose(1, 2)


def _landed(x: Tensor, like: Tensor) -> Tensor:
    """The first columns of ``x`` in the width and dtype of ``like``, tokens outermost."""
    memory = _by_token(like, like.shape[-1])
    if (x.shape, x.stride(), x.dtype) == (memory.shape, memory.stride(), memory.dtype):
        return x
    return memory.copy_(x[..., : like.shape[-1]])


def _wide(x: Tensor, width: int, column: Tensor | float = 0.0) -> Tensor:
    """``x`` with ``column`` (b, #h, n) in the last of ``width`` columns and zeros between, in the dtype that sums run in."""
    dtype = accumulate_dtype(x.dtype)
    if x.shape[-1] == width:
        return x.to(dtype)
    found = _by_token(x, width, dtype)
    found[..., : x.shape[-1]] = x
    found[..., x.shape[-1] :] = 0
    found[..., -1] = column
    return found


def _problem(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, width: int) -> tuple[Any, ...]:
    """Queries, keys and values of one width, and the factor of the products; a column of these carries the mask."""
    if key_mask is None:
        return _wide(q, width), _wide(k, width), _wide(v, width), scale
    # What stands at a masked key must not matter, and 0 * nan is not 0.
    k, v = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (k, v))
    dtype = accumulate_dtype(q.dtype)
    shut = torch.zeros_like(key_mask, dtype=dtype).masked_fill_(~key_mask, torch.finfo(dtype).min / 4)
    return _wide(q.to(dtype) * scale, width, 1.0), _wide(k, width, shut[:, None]), _wide(v, width), 1.0


def _empty(key_mask: Tensor) -> Tensor:
    """(b, 1, n): queries without a real key."""
    return (key_mask.cumsum(1) == 0).unsqueeze(1)


@torch.library.custom_op(
    "attnlab::causal_partial_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale) -> (Tensor, Tensor)",
)
@full_precision
def forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of each of n queries over the real ones of the n keys up to it."""
    width = max(q.shape[-1] + (key_mask is not None), v.shape[-1])
    *inputs, factor = _problem(q, k, v, key_mask, scale, width)
    out, lse = FLASH(*inputs, 0.0, True, scale=factor)
    if key_mask is not None:
        nothing = _empty(key_mask)
        out, lse = out.masked_fill(nothing.unsqueeze(-1), 0), lse.masked_fill(nothing, -INF)
    return _landed(out, v), lse.contiguous()


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _by_token(v, v.shape[-1]), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op(
    "attnlab::causal_partial_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor out, Tensor lse, Tensor dout, Tensor dlse, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)
@full_precision
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    width = max(q.shape[-1] + (key_mask is not None), v.shape[-1] + 1)
    *inputs, factor = _problem(q, k, v, key_mask, scale, width)
    if key_mask is not None:
        nothing = _empty(key_mask)
        lse = lse.masked_fill(nothing, INF)  # weights of 0
        dlse, dout = dlse.masked_fill(nothing, 0), dout.masked_fill(nothing.unsqueeze(-1), 0)  # that of -inf may be nan
    came, found = _wide(dout, width, dlse), _wide(out, width, -1.0)
    dq, dk, dv = FLASH_BACKWARD(came, *inputs, found, lse, 0.0, True, scale=factor)
    if key_mask is not None:
        dq = dq * scale
        dk, dv = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (dk, dv))
    return _landed(dq, q), _landed(dk, k), _landed(dv, v)


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _by_token(q, q.shape[-1]), _by_token(k, k.shape[-1]), _by_token(v, v.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, key_mask, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    return *backward(q, k, v, key_mask, out, lse, dout, dlse, ctx.scale), None, None


forward.register_autograd(_differentiate, setup_context=_save)
