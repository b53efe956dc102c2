r"""Causal linear attention on a GPU: the kernels of `kernels` behind a custom op with its own backward.

The output is the kernels' map $L(a, b, c; S)$ of $(Q, K, V; S_0)$. With the gradient $R$ of the last state and the mirrored
map $\bar L$, which runs from the last token to the first,

$$dQ = L(dO, V, K; S_0^\top), \quad dV = \bar L(K, Q, dO; R), \quad dK = \bar L(V, dO, Q; R^\top),$$

and the gradient of $S_0$ is the last state of $\bar L(K, Q, dO; R)$. Products of half-precision rows run on tensor cores with
float32 sums; those of float32 rows do not, as that would take TF32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import full_precision
from attnlab.ops.linear_attention import eager, kernels
from attnlab.ops.triton_launch import (
    WIDEST,
    dot_precision,
    empty_heads,
    on_device,
    packed,
    power_of_two,
    segment_length,
    segment_room,
)


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
    """What `attnlab.ops.linear_attention` documents; without causality two products, PyTorch's own as in `eager`."""
    if not causal:
        return eager.linear_attention(q, k, v, log_decay=log_decay, scale=scale, initial_state=initial_state, causal=causal)
    # Columns of v never meet, so that those beyond a kernel's widest head go through on their own.
    parts = v.split(WIDEST, -1)
    edges = [None] * len(parts) if initial_state is None else list(initial_state.split(WIDEST, -1))
    results = [_forward(q, k, part, log_decay, edge, scale) for part, edge in zip(parts, edges, strict=True)]
    if len(results) == 1:
        return results[0][0], results[0][1]
    return torch.cat([o for o, _, _ in results], -1), torch.cat([last for _, last, _ in results], -1)


class Rows(NamedTuple):
    """The three sequences of the kernels' map, and the logarithms of the decays."""

    a: Float[Tensor, "b h n d"]
    b: Float[Tensor, "b h n d"]
    c: Float[Tensor, "b h n e"]
    log_decay: Float[Tensor, " h"] | None


class Plan(NamedTuple):
    """How the kernels cut tokens and states: segments and their tokens, the tokens of a chunk, the columns of a tile."""

    segments: int
    span: int
    chunk: int
    columns: int

    @classmethod
    def build(cls, q: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"]) -> Plan:
        """The plan for the GPU of ``q``."""
        b, h, n, d = q.shape
        chunk, columns = 64, 64
        if q.dtype == torch.float32:
            # Without tensor cores a thread holds whole rows of both factors, which limits how many it can have.
            chunk, columns = (16, 32) if max(d, v.shape[-1]) <= 64 else (32, 64)
        chunk = min(chunk, power_of_two(n, 16))
        span = segment_length(q, n, b * h * -(-min(d, v.shape[-1]) // 64), chunk)
        return cls(-(-n // span), span, chunk, columns)

    def tiles(self, d: int, e: int, like: Tensor) -> tuple[int, dict[str, Any]]:
        """Tiles of the columns of a (d, e) state whose rows one program holds, and the options of its kernel."""
        rows, columns = power_of_two(d, 16), min(power_of_two(e, 16), self.columns)
        small = rows * columns <= 64 * 64
        stages = 1 if like.dtype == torch.float32 else 3 if small else 2
        options = {"CHUNK": self.chunk, "BD": rows, "BE": columns, "PRECISION": dot_precision(like)}
        return -(-e // columns), options | {"num_warps": 4 if small else 8, "num_stages": stages}


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _starts(
    rows: Rows, edge: Float[Tensor, "b h d e"], plan: Plan, room: int, weight: float, reverse: bool
) -> Float[Tensor, "bh room d e"]:
    """The states before all segments, of which ``edge`` is the first."""
    (h, n, d), e = rows.b.shape[1:], rows.c.shape[-1]
    groups = edge.shape[0] * h
    states = edge.new_empty(groups, room, d, e)
    states[:, plan.segments :] = 0
    if plan.segments == 1:
        states[:, 0] = edge.flatten(0, 1)
        return states
    decayed = {"HAS_DECAY": rows.log_decay is not None, "REVERSE": reverse}
    _, options = plan.tiles(min(d, 64), min(e, 64), rows.b)
    tiles = -(-d // options["BD"]) * -(-e // options["BE"])
    sizes = (h, n, plan.segments, plan.span, room)
    kernels._local_states[(groups * plan.segments, tiles)](
        rows.b, rows.c, rows.log_decay, states, *_strides(rows.b, rows.c), *sizes, d, e, weight, **decayed, **options
    )
    kernels._carry_states[(groups, -(-d * e // 1024))](
        states, edge.contiguous(), rows.log_decay, *sizes, d * e, **decayed, BLOCK=1024
    )
    return states


def _walk(
    rows: Rows,
    states: Float[Tensor, "bh room d e"],
    plan: Plan,
    scales: tuple[float, float, float],
    *,
    reverse: bool = False,
    flipped: bool = False,
    last: Float[Tensor, "b h d e"] | None = None,
) -> Float[Tensor, "b h n e"]:
    """The rows of the kernels' map; ``flipped``: the states hold their transposes."""
    (h, n, d), e = rows.a.shape[1:], rows.c.shape[-1]
    out = empty_heads(rows.c, e)
    tiles, options = plan.tiles(d, e, rows.a)
    kernels._walk[(states.shape[0] * plan.segments, tiles)](
        *rows,
        states,
        out,
        last,
        *_strides(rows.a, rows.b, rows.c, out),
        *((1, d) if flipped else (e, 1)),
        h,
        n,
        plan.segments,
        plan.span,
        states.shape[1],
        d,
        e,
        *scales,
        HAS_DECAY=rows.log_decay is not None,
        REVERSE=reverse,
        STORE_LAST=last is not None,
        **options,
    )
    return out


@torch.library.custom_op(
    "attnlab::linear_attention_triton_forward",
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
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"], Float[Tensor, "bh room d e"]]:
    """Output, last state, and the states before the segments."""
    rows = Rows(packed(q), packed(k), packed(v), None if log_decay is None else log_decay.contiguous())
    shape = (*q.shape[:2], q.shape[3], v.shape[3])
    edge = q.new_zeros(shape, dtype=accumulate_dtype(q.dtype)) if state is None else state
    plan = Plan.build(q, v)
    last = torch.empty_like(edge, memory_format=torch.contiguous_format)
    with on_device(q):
        starts = _starts(rows, edge, plan, segment_room(q.shape[2]), 1.0, False)
        o = _walk(rows, starts, plan, (scale, scale, 1.0), last=last)
    return o, last, starts


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (b, h, n, d), e = q.shape, v.shape[-1]
    wide = accumulate_dtype(q.dtype)
    starts = q.new_empty(b * h, segment_room(n), d, e, dtype=wide)
    return empty_heads(v, e), q.new_empty(b, h, d, e, dtype=wide), starts


@torch.library.custom_op(
    "attnlab::linear_attention_triton_backward",
    mutates_args=(),
    schema="(Tensor grad_o, Tensor grad_last, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor starts, "
    "float scale, bool needs_decay) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_o: Float[Tensor, "b h n e"],
    grad_last: Float[Tensor, "b h d e"],
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    log_decay: Float[Tensor, " h"] | None,
    starts: Float[Tensor, "bh room d e"],
    scale: float,
    needs_decay: bool,
) -> tuple[
    Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n e"], Float[Tensor, " h"], Float[Tensor, "b h d e"]
]:
    """Gradients of q, k, v, the decays and the initial state."""
    q, k, v, g = (packed(x) for x in (q, k, v, grad_o))
    log_decay = None if log_decay is None else log_decay.contiguous()
    plan = Plan.build(q, v)
    grad_state = torch.empty_like(grad_last, memory_format=torch.contiguous_format)
    grad_decay = grad_last.new_zeros(q.shape[1])
    with on_device(q):
        mirrored = Rows(k, q, g, log_decay)
        ends = _starts(mirrored, grad_last, plan, plan.segments, scale, True)
        grad_q = _walk(Rows(g, v, k, log_decay), starts, plan, (scale, scale, 1.0), flipped=True)
        grad_v = _walk(mirrored, ends, plan, (scale, 1.0, scale), reverse=True, last=grad_state)
        grad_k = _walk(Rows(v, g, q, log_decay), ends, plan, (scale, 1.0, scale), reverse=True, flipped=True)
        if needs_decay:
            grad_decay = _decay_gradient(Rows(q, k, v, log_decay), g, starts, ends, plan, scale)
    return grad_q, grad_k, grad_v, grad_decay, grad_state


def _decay_gradient(
    rows: Rows,
    g: Float[Tensor, "b h n e"],
    starts: Float[Tensor, "bh room d e"],
    ends: Float[Tensor, "bh segments d e"],
    plan: Plan,
    scale: float,
) -> Float[Tensor, " h"]:
    """The gradient of the logarithms of the decays."""
    (h, n, d), e = rows.a.shape[1:], rows.c.shape[-1]
    tiles, options = plan.tiles(d, e, rows.a)
    parts = starts.new_empty(rows.a.shape[0], h, plan.segments * tiles)
    sizes = (h, n, plan.segments, plan.span, starts.shape[1], ends.shape[1], d, e, scale)
    kernels._decay_gradient[(starts.shape[0] * plan.segments, tiles)](
        *rows[:3], g, rows.log_decay, starts, ends, parts, *_strides(*rows[:3], g), *sizes, **options
    )
    return parts.sum((0, 2))


@_backward.register_fake
def _backward_fake(
    grad_o: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    starts: Tensor,
    scale: float,
    needs_decay: bool,
) -> tuple[Tensor, ...]:
    return (
        *(empty_heads(x, x.shape[-1]) for x in (q, k, v)),
        grad_last.new_empty(q.shape[1]),
        grad_last.new_empty(grad_last.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, _, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, log_decay, output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, grad_o: Tensor, grad_last: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    *grads, grad_decay, grad_state = _backward(grad_o, grad_last, *ctx.saved_tensors, ctx.scale, needed[3])
    return *grads, grad_decay if needed[3] else None, grad_state if needed[4] else None, None


_forward.register_autograd(_differentiate, setup_context=_save)
