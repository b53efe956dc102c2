"""Linear attention in PyTorch: chunks behind a custom op with its own backward, two products without causality, one step."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import first_state, full_precision, room_for_starts, rows
from attnlab.ops.linear_attention import chunked


@full_precision
def linear_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    *,
    log_decay: Float[Tensor, " h"] | None,
    scale: float,
    initial_state: Float[Tensor, "b h d e"] | None,
    causal: bool,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    """What `attnlab.ops.linear_attention` documents; time and memory linear in n."""
    dtype, wide = v.dtype, accumulate_dtype(v.dtype)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if not causal:
        o, state = _all_to_all(q, k, v, scale, initial_state)
    elif q.shape[2] == 1:
        o, state = _step(q, k, v, log_decay, scale, initial_state)
    else:
        o, state, _ = _forward(q, k, v, log_decay, initial_state, scale)
    return o.to(dtype), state


def _all_to_all(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    scale: float,
    state: Float[Tensor, "b h d e"] | None,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    summed = k.mT @ v
    summed = summed if state is None else summed + state
    return q @ (summed if scale == 1.0 else summed * scale), summed


def _step(
    q: Float[Tensor, "b h 1 d"],
    k: Float[Tensor, "b h 1 d"],
    v: Float[Tensor, "b h 1 e"],
    log_decay: Float[Tensor, " h"] | None,
    scale: float,
    state: Float[Tensor, "b h d e"] | None,
) -> tuple[Float[Tensor, "b h 1 e"], Float[Tensor, "b h d e"]]:
    """One token: the recurrence itself is the shortest way."""
    state = first_state(q, v, state)
    if log_decay is not None:
        state = state * log_decay.exp()[:, None, None]
    state = torch.addcmul(state, k.mT, v)
    return (q if scale == 1.0 else q * scale) @ state, state


def _flat(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    log_decay: Float[Tensor, " h"] | None,
    state: Float[Tensor, "b h d e"] | None,
) -> tuple[
    Float[Tensor, "bh n d"],
    Float[Tensor, "bh n d"],
    Float[Tensor, "bh n e"],
    Float[Tensor, " bh"] | None,
    Float[Tensor, "bh d e"],
]:
    """The inputs with batch and heads as one."""
    decays = None if log_decay is None else log_decay.expand(q.shape[:2]).flatten()
    return rows(q), rows(k), rows(v), decays, first_state(q, v, state).flatten(0, 1)


@torch.library.custom_op(
    "attnlab::linear_attention_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? state, float scale) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    log_decay: Float[Tensor, " h"] | None,
    state: Float[Tensor, "b h d e"] | None,
    scale: float,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"], Float[Tensor, "b h starts"]]:
    """The causal form: output, last state, and the states that the backward starts from."""
    results = chunked.forward(*_flat(q, k, v, log_decay, state), scale)
    o, last, starts = (x.unflatten(0, q.shape[:2]) for x in results)
    return o, last, starts.flatten(2)


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (b, h, n, d), e = q.shape, v.shape[-1]
    o, last = v.new_empty(b, h, n, e), v.new_empty(b, h, d, e)
    return o, last, v.new_empty(b, h, room_for_starts(n, chunked.CHUNK, chunked.TILE) * d * e)


@torch.library.custom_op(
    "attnlab::linear_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_o, Tensor grad_last, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? state, Tensor starts, "
    "float scale, bool needs_decay) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_o: Float[Tensor, "b h n e"],
    grad_last: Float[Tensor, "b h d e"],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    log_decay: Float[Tensor, " h"] | None,
    state: Float[Tensor, "b h d e"] | None,
    starts: Float[Tensor, "b h starts"],
    scale: float,
    needs_decay: bool,
) -> tuple[
    Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n e"], Float[Tensor, " h"], Float[Tensor, "b h d e"]
]:
    """Gradients of q, k, v, the decays and the initial state."""
    later = starts.unflatten(2, (-1, q.shape[-1], v.shape[-1])).flatten(0, 1)
    inputs = _flat(q, k, v, log_decay, state)
    results = chunked.backward(rows(grad_o), grad_last.flatten(0, 1), *inputs, later, scale, needs_decay)
    grad_q, grad_k, grad_v, grad_decay, grad_state = (x.unflatten(0, q.shape[:2]) for x in results)
    return grad_q, grad_k, grad_v, grad_decay.sum(0), grad_state


@_backward.register_fake
def _backward_fake(
    grad_o: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    starts: Tensor,
    scale: float,
    needs_decay: bool,
) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(q.shape[1]), q.new_empty(grad_last.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, grad_o: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    *grads, grad_decay, grad_state = _backward(grad_o, grad_last, *ctx.saved_tensors, ctx.scale, needed[3])
    return *grads, grad_decay if needed[3] else None, grad_state if needed[4] else None, None


_forward.register_autograd(_differentiate, setup_context=_save)
