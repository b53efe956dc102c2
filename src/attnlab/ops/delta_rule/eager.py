"""The delta rule in PyTorch: chunks behind a custom op with its own backward, and the recurrence itself for one token."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import first_state, full_precision, room_for_starts, rows
from attnlab.ops.delta_rule import chunked


@full_precision
def delta_rule(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    beta: Float[Tensor, "b h n"],
    *,
    log_decay: Float[Tensor, "b h n"] | None,
    scale: float,
    initial_state: Float[Tensor, "b h d e"] | None,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    """What `attnlab.ops.delta_rule` documents; time and memory linear in n."""
    dtype, wide = v.dtype, accumulate_dtype(v.dtype)
    q, k, v, beta = q.to(wide), k.to(wide), v.to(wide), beta.to(wide)
    gate = None if log_decay is None else log_decay.to(wide)
    if q.shape[2] == 1:
        o, state = _step(q, k, v, beta, gate, scale, initial_state)
    else:
        o, state, _ = _forward(q, k, v, beta, gate, initial_state, scale)
    return o.to(dtype), state


def _step(
    q: Float[Tensor, "b h 1 d"],
    k: Float[Tensor, "b h 1 d"],
    v: Float[Tensor, "b h 1 e"],
    beta: Float[Tensor, "b h 1"],
    gate: Float[Tensor, "b h 1"] | None,
    scale: float,
    state: Float[Tensor, "b h d e"] | None,
) -> tuple[Float[Tensor, "b h 1 e"], Float[Tensor, "b h d e"]]:
    """One token: the recurrence itself is the shortest way."""
    state = first_state(q, v, state)
    if gate is not None:
        state = state * gate.exp().unsqueeze(-1)
    state = torch.addcmul(state, k.mT, beta.unsqueeze(-1) * (v - k @ state))
    return (q * scale) @ state, state


def _flat(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    beta: Float[Tensor, "b h n"],
    gate: Float[Tensor, "b h n"] | None,
) -> chunked.Inputs:
    """The inputs with batch and heads as one."""
    return chunked.Inputs(rows(q), rows(k), rows(v), rows(beta.unsqueeze(-1)), None if gate is None else rows(gate.unsqueeze(-1)))


@torch.library.custom_op(
    "attnlab::delta_rule_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? gate, Tensor? state, float scale) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    beta: Float[Tensor, "b h n"],
    gate: Float[Tensor, "b h n"] | None,
    state: Float[Tensor, "b h d e"] | None,
    scale: float,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"], Float[Tensor, "b h starts"]]:
    """Output, last state, and the states that the backward starts from."""
    results = chunked.forward(_flat(q, k, v, beta, gate), first_state(q, v, state).flatten(0, 1), scale)
    o, last, starts = (x.unflatten(0, q.shape[:2]) for x in results)
    return o, last, starts.flatten(2)


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (b, h, n, d), e = q.shape, v.shape[-1]
    o, last = v.new_empty(b, h, n, e), v.new_empty(b, h, d, e)
    return o, last, v.new_empty(b, h, room_for_starts(n, chunked.CHUNK, chunked.TILE) * d * e)


@torch.library.custom_op(
    "attnlab::delta_rule_backward",
    mutates_args=(),
    schema="(Tensor grad_o, Tensor grad_last, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? gate, Tensor? state, "
    "Tensor starts, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_o: Float[Tensor, "b h n e"],
    grad_last: Float[Tensor, "b h d e"],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    beta: Float[Tensor, "b h n"],
    gate: Float[Tensor, "b h n"] | None,
    state: Float[Tensor, "b h d e"] | None,
    starts: Float[Tensor, "b h starts"],
    scale: float,
) -> tuple[
    Float[Tensor, "b h n d"],
    Float[Tensor, "b h n d"],
    Float[Tensor, "b h n e"],
    Float[Tensor, "b h n"],
    Float[Tensor, "b h _"],
    Float[Tensor, "b h d e"],
]:
    """Gradients of q, k, v, beta, the gate (empty if there is none) and the initial state."""
    later = starts.unflatten(2, (-1, q.shape[-1], v.shape[-1])).flatten(0, 1)
    first = first_state(q, v, state).flatten(0, 1)
    grads, grad_state = chunked.backward(rows(grad_o), grad_last.flatten(0, 1), _flat(q, k, v, beta, gate), first, later, scale)
    none = q.new_empty(q.shape[0] * q.shape[1], 0, 1)
    wanted = (*grads[:4], none if grads.gate is None else grads.gate, grad_state)
    grad_q, grad_k, grad_v, grad_beta, grad_gate, grad_state = (x.unflatten(0, q.shape[:2]) for x in wanted)
    return grad_q, grad_k, grad_v, grad_beta.squeeze(-1), grad_gate.squeeze(-1), grad_state


@_backward.register_fake
def _backward_fake(
    grad_o: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    state: Tensor | None,
    starts: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    of_gate = q.new_empty((*q.shape[:2], 0) if gate is None else gate.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v, beta)), of_gate, grad_last.new_empty(grad_last.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, grad_o: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    *grads, grad_gate, grad_state = _backward(grad_o, grad_last, *ctx.saved_tensors, ctx.scale)
    return *grads, grad_gate if needed[4] else None, grad_state if needed[5] else None, None


_forward.register_autograd(_differentiate, setup_context=_save)
