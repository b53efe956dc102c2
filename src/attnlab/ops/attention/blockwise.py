"""Dense attention in blocks as one differentiable custom op."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.attention import blocks, gradients
from attnlab.ops.attention.normalizers import Normalizer, create_normalizer
from attnlab.ops.attention.pairwise import Pairwise
from attnlab.ops.backends import accumulate_dtype

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? offsets, Tensor? keys, Tensor? factor, Tensor? factor_offsets, "
    "Tensor? key_mask, Tensor? pair_mask, float scale, bool causal, str normalizer, float[] numbers"
)


def blockwise_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    *,
    scale: float,
    bias: Pairwise,
    factor: Pairwise,
    causal: bool,
    key_mask: Bool[Tensor, "b m"] | None,
    pair_mask: Bool[Tensor, "#b #h n m"] | None,
    normalizer: Normalizer,
) -> Float[Tensor, "b h n e"]:
    """What `attnlab.ops.attention.attention` documents; memory grows with n + m, plus one block of weights."""
    heads = q.shape[1]
    tables = [
        None if x is None else x.expand(heads, *x.shape[1:]).contiguous() for x in (bias.offsets, bias.keys, factor.offsets)
    ]
    return _forward(
        q,
        k,
        v,
        bias.dense,
        tables[0],
        tables[1],
        factor.dense,
        tables[2],
        key_mask,
        pair_mask,
        scale,
        causal,
        normalizer.name,
        list(normalizer.numbers),
    )


def _problem(*inputs: Any) -> blocks.Problem:
    """A `blocks.Problem` from the arguments of the op."""
    *tensors, key_mask, pair_mask, scale, causal, name, numbers = inputs
    wide = accumulate_dtype(tensors[2].dtype)
    q, *others = (None if x is None else x.to(wide) for x in tensors)
    rest: list[Any] = [*others, key_mask, pair_mask, causal, create_normalizer(name, *numbers)]
    return blocks.Problem(q * scale, *rest)


@torch.library.custom_op("attnlab::blockwise_attention_forward", mutates_args=(), schema=f"({_TENSORS}) -> Tensor")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    keys: Tensor | None,
    factor: Tensor | None,
    factor_offsets: Tensor | None,
    key_mask: Tensor | None,
    pair_mask: Tensor | None,
    scale: float,
    causal: bool,
    normalizer: str,
    numbers: list[float],
) -> Tensor:
    """The output (b, h, n, e) in the dtype of v."""
    inputs = (q, k, v, bias, offsets, keys, factor, factor_offsets, key_mask, pair_mask)
    return blocks.forward(_problem(*inputs, scale, causal, normalizer, numbers)).to(v.dtype)


@_forward.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return v.new_empty((*q.shape[:3], v.shape[3]))


@torch.library.custom_op(
    "attnlab::blockwise_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {_TENSORS}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    keys: Tensor | None,
    factor: Tensor | None,
    factor_offsets: Tensor | None,
    key_mask: Tensor | None,
    pair_mask: Tensor | None,
    scale: float,
    causal: bool,
    normalizer: str,
    numbers: list[float],
    needed: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients of the eight floating inputs; empty where ``needed`` says no or there is none."""
    inputs = (q, k, v, bias, offsets, keys, factor, factor_offsets)
    p = _problem(*inputs, key_mask, pair_mask, scale, causal, normalizer, numbers)
    grads = gradients.backward(p, grad_out.to(p.q.dtype), needed)
    grads = grads._replace(q=grads.q * scale)
    return tuple(q.new_empty(0) if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))  # type: ignore[union-attr]


@_backward.register_fake
def _backward_fake(grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs, needed = rest[:8], rest[-1]
    always = (True, True, True, False, False, False, False, False)
    return tuple(
        inputs[0].new_empty(0) if x is None or not (need or keep) else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, need, keep in zip(inputs, needed, always, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:8])
    grads = _backward(grad_out, *ctx.saved_tensors, *ctx.options, needed)
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), *(None,) * 6


_forward.register_autograd(_differentiate, setup_context=_save)
