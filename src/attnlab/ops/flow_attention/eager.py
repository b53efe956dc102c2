"""Flow attention in PyTorch: chunks behind a custom op with its own backward."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.chunks import room_for_starts, rows
from attnlab.ops.flow_attention import chunked, gradient

_NUMBERS = len(chunked.Kept._fields)


def flow_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    number: Float[Tensor, "b n"],
    mask: Bool[Tensor, "b n"] | None,
    first: tuple[Tensor, ...],
    eps: float,
) -> tuple[Float[Tensor, "b h n e"], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What `attnlab.ops.flow_attention` documents; time and memory linear in n."""
    products, *sums, competition = first
    state = torch.cat((products, torch.stack(sums, -1)), -1)
    o, last, rivals, _, inflow, _, _, allocation, _, rivalry = _forward(q, k, v, number, mask, state, competition, eps)
    e = v.shape[-1]
    return o, (inflow, allocation, rivalry), (last[..., :e], *last[..., e:].unbind(-1), rivals)


def _flat(q: Tensor, k: Tensor, v: Tensor, number: Tensor, mask: Tensor | None) -> chunked.Inputs:
    """The inputs with batch and heads as one."""
    b, h, n = q.shape[:3]
    number = number[:, None].expand(b, h, n).flatten(0, 1)
    real = None if mask is None else mask[:, None].expand(b, h, n).flatten(0, 1)
    return chunked.Inputs(rows(q), rows(k), rows(v), number, real)


@torch.library.custom_op(
    "attnlab::flow_attention_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor number, Tensor? mask, Tensor state, Tensor competition, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    number: Float[Tensor, "b n"],
    mask: Bool[Tensor, "b n"] | None,
    state: Float[Tensor, "b h d e4"],
    competition: Float[Tensor, "b h"],
    eps: float,
) -> tuple[Tensor, ...]:
    """Output, last state, its competition, the states that the backward starts from, and `chunked.Kept`."""
    inputs = _flat(q, k, v, number, mask)
    o, kept, last, rivals, starts = chunked.forward(inputs, state.flatten(0, 1), competition.flatten(), eps)
    return tuple(x.unflatten(0, q.shape[:2]) for x in (o, last, rivals, starts.flatten(1), *kept))


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, number: Tensor, mask: Tensor | None, state: Tensor, competition: Tensor, eps: float
) -> tuple[Tensor, ...]:
    b, h, n, _ = q.shape
    starts = state.new_empty(b, h, room_for_starts(n, chunked.CHUNK, chunked.TILE) * state[0, 0].numel())
    kept = (q.new_empty(b, h, n) for _ in range(_NUMBERS))
    return v.new_empty(v.shape), state.new_empty(state.shape), competition.new_empty(competition.shape), starts, *kept


@torch.library.custom_op(
    "attnlab::flow_attention_backward",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor q, Tensor k, Tensor v, Tensor number, Tensor? mask, Tensor state, Tensor o, Tensor starts, "
    "Tensor[] kept, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grads: list[Tensor],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    number: Float[Tensor, "b n"],
    mask: Bool[Tensor, "b n"] | None,
    state: Float[Tensor, "b h d e4"],
    o: Float[Tensor, "b h n e"],
    starts: Float[Tensor, "b h starts"],
    kept: list[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the state and the competition, from those of output, last state, its competition and the flows."""
    grad_o, grad_last, grad_rivals, *flows = grads
    given = gradient.Incoming(rows(o), rows(grad_o), *(x.flatten(0, 1) for x in flows))
    numbers = chunked.Kept(*(x.flatten(0, 1) for x in kept))
    later = starts.unflatten(2, (-1, *state.shape[2:])).flatten(0, 1)
    last, rivals, first = (x.flatten(0, 1) for x in (grad_last, grad_rivals, state))
    found = gradient.backward(given, last, rivals, _flat(q, k, v, number, mask), numbers, first, later, eps)
    grad_q, grad_k, grad_v, grad_state, grad_competition = (x.unflatten(0, q.shape[:2]) for x in found)
    return grad_q, grad_k, grad_v, grad_state, grad_competition


@_backward.register_fake
def _backward_fake(
    grads: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    number: Tensor,
    mask: Tensor | None,
    state: Tensor,
    o: Tensor,
    starts: Tensor,
    kept: list[Tensor],
    eps: float,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, state, grads[2]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.eps = inputs
    o, _, _, starts, *kept = output
    ctx.save_for_backward(*tensors, o, starts, *kept)


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, number, mask, state, o, starts, *kept = ctx.saved_tensors
    grad_o, last, rivals, _, inflow, _, _, allocation, _, competition = grads
    wanted = [grad_o, last, rivals, inflow, allocation, competition]
    grad_q, grad_k, grad_v, grad_state, grad_rivals = _backward(wanted, q, k, v, number, mask, state, o, starts, kept, ctx.eps)
    return grad_q, grad_k, grad_v, None, None, grad_state, grad_rivals, None


_forward.register_autograd(_differentiate, setup_context=_save)
