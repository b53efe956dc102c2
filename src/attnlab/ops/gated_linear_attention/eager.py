"""Gated linear attention in PyTorch: chunks behind a custom op with its own backward, and one step."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import first_state, full_precision, rows
from attnlab.ops.gated_linear_attention import chunked


@full_precision
def gated_linear_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    log_decay: Float[Tensor, "b h n w"],
    *,
    scale: float,
    initial_state: Float[Tensor, "b h d e"] | None,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    """What `attnlab.ops.gated_linear_attention` documents; time and memory linear in n."""
    dtype, wide = v.dtype, accumulate_dtype(v.dtype)
    q, k, v, log_decay = (x.to(wide) for x in (q, k, v, log_decay))
    if q.shape[2] == 1:
        state = log_decay.exp().mT * first_state(q, v, initial_state)
        state = torch.addcmul(state, k.mT, v)
        return ((q * scale) @ state).to(dtype), state
    o, state, _ = _forward(q, k, v, log_decay, initial_state, scale)
    return o.to(dtype), state


@torch.library.custom_op(
    "attnlab::gated_linear_attention_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, float scale) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    log_decay: Float[Tensor, "b h n w"],
    state: Float[Tensor, "b h d e"] | None,
    scale: float,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"], Float[Tensor, "b h starts"]]:
    """Output, last state, and the states that the backward starts from."""
    inputs = chunked.Inputs(rows(q), rows(k), rows(v), rows(log_decay))
    results = chunked.forward(inputs, first_state(q, v, state).flatten(0, 1), scale)
    o, last, starts = (x.unflatten(0, q.shape[:2]) for x in results)
    return o, last, starts.flatten(2)


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (b, h, n, d), e = q.shape, v.shape[-1]
    o, last = v.new_empty(b, h, n, e), v.new_empty(b, h, d, e)
    return o, last, v.new_empty(b, h, chunked.starts_of(n) * d * e)


@torch.library.custom_op(
    "attnlab::gated_linear_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_o, Tensor grad_last, Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor starts, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_o: Float[Tensor, "b h n e"],
    grad_last: Float[Tensor, "b h d e"],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    log_decay: Float[Tensor, "b h n w"],
    state: Float[Tensor, "b h d e"] | None,
    starts: Float[Tensor, "b h starts"],
    scale: float,
) -> tuple[
    Float[Tensor, "b h n d"],
    Float[Tensor, "b h n d"],
    Float[Tensor, "b h n e"],
    Float[Tensor, "b h n w"],
    Float[Tensor, "b h d e"],
]:
    """Gradients of q, k, v, log_decay and the initial state."""
    later = starts.unflatten(2, (-1, q.shape[-1], v.shape[-1])).flatten(0, 1)
    inputs = chunked.Inputs(rows(q), rows(k), rows(v), rows(log_decay))
    first = first_state(q, v, state).flatten(0, 1)
    grads, grad_state = chunked.backward(rows(grad_o), grad_last.flatten(0, 1), inputs, first, later, scale)
    grad_q, grad_k, grad_v, grad_decay, grad_state = (x.unflatten(0, q.shape[:2]) for x in (*grads, grad_state))
    return grad_q, grad_k, grad_v, grad_decay, grad_state


@_backward.register_fake
def _backward_fake(
    grad_o: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    starts: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_decay, grad_last))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, grad_o: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *grads, grad_state = _backward(grad_o, grad_last, *ctx.saved_tensors, ctx.scale)
    return *grads, grad_state if ctx.needs_input_grad[4] else None, None


_forward.register_autograd(_differentiate, setup_context=_save)
