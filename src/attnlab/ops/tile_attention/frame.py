"""Tile attention as a custom operator with its own backward, around either implementation of the two."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.tile_attention.inputs import Given, Inputs


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    queries: Int[Tensor, "#b #h t x"],
    keys: Int[Tensor, "#b #h t y"],
    bias: Float[Tensor, "#h kinds x y"] | None,
    kind: Int[Tensor, "t"] | None,
    causal: bool,
    key_mask: Bool[Tensor, "b m"] | None,
    zero_outside: bool,
    scale: float,
    backend: str = "eager",
) -> tuple[Float[Tensor, "b h t x e"], Float[Tensor, "b h t x"]]:
    """See `reference.attend`; ``backend`` is "eager" or "triton". Backward is not differentiable again."""
    return forward(q, k, v, queries, keys, bias, kind, causal, key_mask, zero_outside, scale, backend)


def implementation(backend: str) -> Any:
    """The module with `forward` and `backward`; Triton is imported where it is used."""
    return import_module(f"attnlab.ops.tile_attention.{backend}")


@torch.library.custom_op(
    "attnlab::tile_attention_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor queries, Tensor keys, Tensor? bias, Tensor? kind, bool causal, "
    "Tensor? key_mask, bool zero_outside, float scale, str backend) -> (Tensor, Tensor)",
)
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    kind: Tensor | None,
    causal: bool,
    key_mask: Tensor | None,
    zero_outside: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of every tile; the arguments of `attend`."""
    inputs = Inputs(q, k, v, queries, keys, bias, kind, key_mask, causal, zero_outside, scale)
    found: tuple[Tensor, Tensor] = implementation(backend).forward(inputs)
    return found


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    kind: Tensor | None,
    causal: bool,
    key_mask: Tensor | None,
    zero_outside: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:2], *queries.shape[2:])
    return q.new_empty(*shape, v.shape[-1]), q.new_empty(shape, dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op(
    "attnlab::tile_attention_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor queries, Tensor keys, Tensor? bias, Tensor? kind, Tensor? key_mask, "
    "Tensor out, Tensor lse, Tensor dout, Tensor dlse, bool causal, bool zero_outside, float scale, str backend, bool to_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    kind: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    causal: bool,
    zero_outside: bool,
    scale: float,
    backend: str,
    to_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the bias (empty without ``to_bias``)."""
    inputs = Inputs(q, k, v, queries, keys, bias, kind, key_mask, causal, zero_outside, scale)
    given = Given(out, lse, dout, dlse)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = implementation(backend).backward(inputs, given, to_bias)
    return found


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    kind: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    causal: bool,
    zero_outside: bool,
    scale: float,
    backend: str,
    to_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if to_bias and bias is not None else lse.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, queries, keys, bias, kind, causal, key_mask, zero_outside, scale, backend = inputs
    ctx.save_for_backward(q, k, v, queries, keys, bias, kind, key_mask, *output)
    ctx.options = (causal, zero_outside, scale, backend)
    ctx.to_bias = bias is not None and bias.requires_grad


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *arguments, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    dq, dk, dv, dbias = backward(*arguments, out, lse, dout, dlse, *ctx.options, ctx.to_bias)
    return dq, dk, dv, None, None, dbias if ctx.to_bias else None, None, None, None, None, None, None, None


forward.register_autograd(_differentiate, setup_context=_save)
