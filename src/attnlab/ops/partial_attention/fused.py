"""Partial attention on PyTorch's fused CPU kernel, which skips the pairs of the future where it is causal.

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


def _landed(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The first columns of ``x``, tokens outermost."""
    memory = _by_token(x, width, dtype)
    if (x.shape, x.stride(), x.dtype) == (memory.shape, memory.stride(), memory.dtype):
        return x
    return memory.copy_(x[..., :width])


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


def _problem(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float, width: int) -> tuple[Any, ...]:
    """Queries, keys and values of one width, and the factor of the products; a column of these carries the mask."""
    if real is None:
        return _wide(q, width), _wide(k, width), _wide(v, width), scale
    # What stands at a masked key must not matter, and 0 * nan is not 0.
    k, v = (x.masked_fill(~real.unsqueeze(-1), 0) for x in (k, v))
    dtype = accumulate_dtype(q.dtype)
    shut = torch.zeros_like(real, dtype=dtype).masked_fill_(~real, torch.finfo(dtype).min / 4)
    return _wide(q.to(dtype) * scale, width, 1.0), _wide(k, width, shut), _wide(v, width), 1.0


def _empty(real: Tensor, causal: bool) -> Tensor:
    """Queries without a real key, (b, #h, #n)."""
    return real.cumsum(-1) == 0 if causal else ~real.any(-1, keepdim=True)


@torch.library.custom_op(
    "attnlab::fused_partial_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? real, bool causal, float scale) -> (Tensor, Tensor)",
)
@full_precision
def forward(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of each query over the real keys (b, #h, m); causal ones are as many as the keys."""
    width = max(q.shape[-1] + (real is not None), v.shape[-1])
    *inputs, factor = _problem(q, k, v, real, scale, width)
    out, lse = FLASH(*inputs, 0.0, causal, scale=factor)
    if real is not None:
        nothing = _empty(real, causal)
        out, lse = out.masked_fill(nothing.unsqueeze(-1), 0), lse.masked_fill(nothing, -INF)
    return _landed(out, v.shape[-1], q.dtype), lse.contiguous()


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _by_token(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op(
    "attnlab::fused_partial_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? real, Tensor out, Tensor lse, Tensor dout, Tensor dlse, "
    "bool causal, float scale) -> (Tensor, Tensor, Tensor)",
)
@full_precision
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    width = max(q.shape[-1] + (real is not None), v.shape[-1] + 1)
    *inputs, factor = _problem(q, k, v, real, scale, width)
    if real is not None:
        nothing = _empty(real, causal)
        lse = lse.masked_fill(nothing, INF)  # weights of 0
        dlse, dout = dlse.masked_fill(nothing, 0), dout.masked_fill(nothing.unsqueeze(-1), 0)  # that of -inf may be nan
    came, found = _wide(dout, width, dlse), _wide(out, width, -1.0)
    dq, dk, dv = FLASH_BACKWARD(came, *inputs, found, lse, 0.0, causal, scale=factor)
    if real is not None:
        dq = dq * scale
        dk, dv = (x.masked_fill(~real.unsqueeze(-1), 0) for x in (dk, dv))
    return _landed(dq, q.shape[-1], q.dtype), _landed(dk, k.shape[-1], k.dtype), _landed(dv, v.shape[-1], v.dtype)


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _by_token(q, q.shape[-1]), _by_token(k, k.shape[-1]), _by_token(v, v.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, real, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    return *backward(q, k, v, real, out, lse, dout, dlse, ctx.causal, ctx.scale), None, None, None


forward.register_autograd(_differentiate, setup_context=_save)
