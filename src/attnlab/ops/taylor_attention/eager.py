"""Second-order attention in PyTorch: pieces behind a custom op with its own backward."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.chunks import rows
from attnlab.ops.taylor_attention import pieces


def taylor_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    state: Float[Tensor, "b h w e"] | None,
    causal: bool,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h w e"]]:
    """What `attnlab.ops.taylor_attention` documents; time linear in n, memory that of the inputs where causal."""
    root = pieces.Tables.build(q).weight.sqrt()  # the state has it on both sides, the pieces only where they read
    o, last, _ = _forward(q, k, v, None if state is None else state / root, causal)
    return o, last * root


@torch.library.custom_op(
    "attnlab::taylor_attention_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? state, bool causal) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    state: Float[Tensor, "b h w e"] | None,
    causal: bool,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h w e"], Float[Tensor, "b h starts"]]:
    """Output, last state, and the states before the pieces."""
    first = None if state is None else state.flatten(0, 1)
    o, last, starts = pieces.forward(rows(q), rows(k), rows(v), first, causal)
    o, last, starts = (x.unflatten(0, q.shape[:2]) for x in (o, last, starts.flatten(1)))
    return o, last, starts


@_forward.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    (b, h, n, d), e = q.shape, v.shape[-1]
    size = pieces.width(d) * e
    starts = (n // pieces.CAUSAL + 1) * size if causal else 0
    return q.new_empty(b, h, n, e), q.new_empty(b, h, pieces.width(d), e), q.new_empty(b, h, starts)


@torch.library.custom_op(
    "attnlab::taylor_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_o, Tensor grad_last, Tensor q, Tensor k, Tensor v, Tensor last, Tensor starts, bool causal, bool fresh) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_o: Float[Tensor, "b h n e"],
    grad_last: Float[Tensor, "b h w e"],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m e"],
    last: Float[Tensor, "b h w e"],
    starts: Float[Tensor, "b h starts"],
    causal: bool,
    fresh: bool,
) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"], Float[Tensor, "b h m e"], Float[Tensor, "b h w e"]]:
    """Gradients of q, k, v and the first state."""
    room = starts.shape[2] // last[0, 0].numel()
    before = starts.view(last.shape[0] * last.shape[1], room, *last.shape[2:])
    given = rows(grad_o), grad_last.flatten(0, 1), rows(q), rows(k), rows(v), last.flatten(0, 1)
    grad_q, grad_k, grad_v, grad_state = (x.unflatten(0, q.shape[:2]) for x in pieces.backward(*given, before, causal, fresh))
    return grad_q, grad_k, grad_v, grad_state


@_backward.register_fake
def _backward_fake(
    grad_o: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    last: Tensor,
    starts: Tensor,
    causal: bool,
    fresh: bool,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, last))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, state, ctx.causal = inputs
    ctx.fresh = state is None
    ctx.save_for_backward(q, k, v, *output[1:])


def _differentiate(ctx: Any, grad_o: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *grads, grad_state = _backward(grad_o, grad_last, *ctx.saved_tensors, ctx.causal, ctx.fresh)
    return *grads, None if ctx.fresh else grad_state, None


_forward.register_autograd(_differentiate, setup_context=_save)
