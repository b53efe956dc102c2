"""Neighbourhood attention on sequences that are padded on the right: the last real token is the border, in each example its own.

Examples of one length run together. The lengths are data, so all of it is one operator, for a graph that is traced to hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.neighborhoods import Axis
from attnlab.ops.tile_attention import frame, from_tiles, places_of
from attnlab.ops.tile_attention.neighborhood import eager


def attend_by_length(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, axis: Axis, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`reference.attend` where the axis ends at each example's last real token; windows shrink to short sequences.

    Args:
        q: queries (b, h, n, d).
        k: keys (b, hk, n, d).
        v: values (b, hk, n, e).
        mask: (b, n), True marks a real token.
        axis: the rule; its size is of no account.
        bias: a table (1 or h, 2 w - 1) or None.
        scale: factor of the products.
    """
    rule = [axis.window, axis.stride, axis.dilation]
    return _forward(q, k, v, mask, bias, rule, axis.causal, scale)


class _Group:
    """The examples of one length: their rows, and the tiles of a sequence that long."""

    def __init__(self, length: int, lengths: Tensor, q: Tensor, bias: Tensor | None, rule: list[int], causal: bool) -> None:
        window, stride, dilation = rule
        self.length, self.rows = length, (lengths == length).nonzero().squeeze(1)
        self.axis = Axis.fitted(length, window, stride, dilation, causal)
        self.tiles = eager.arguments(q, (self.axis,), None if bias is None else self.axis.table(bias, 1))
        self.inverse = places_of(self.tiles.queries[0, 0], length)

    def cut(self, x: Tensor) -> Tensor:
        """These examples' tokens of (b, h, n, ...)."""
        return x[self.rows, :, : self.length]

    def to_tiles(self, x: Tensor) -> Tensor:
        """(b, h, n, ...) of these examples, at the queries of their tiles; any value where there is none."""
        places = self.tiles.queries[0, 0].clamp(min=0)
        return self.cut(x).index_select(2, places.flatten()).unflatten(2, places.shape)


def _groups(mask: Tensor, q: Tensor, bias: Tensor | None, rule: list[int], causal: bool) -> Iterator[_Group]:
    lengths = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
    for length in lengths.unique().tolist():
        if length:
            yield _Group(length, lengths, q, bias, rule, causal)


@torch.library.custom_op(
    "attnlab::neighborhood_by_length_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? bias, int[] rule, bool causal, float scale) -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, rule: list[int], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    n = q.shape[2]
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=accumulate_dtype(q.dtype))
    for group in _groups(mask, q, bias, rule, causal):
        queries, keys, kind, term, _ = group.tiles
        real = mask[group.rows, : group.length]
        tokens = (group.cut(q), group.cut(k), group.cut(v))
        some, logs = frame.forward(*tokens, queries, keys, term, kind, False, real, False, scale, "eager")
        out[group.rows] = F.pad(from_tiles(some, group.inverse), (0, 0, 0, n - group.length))
        logs = logs.flatten(2).index_select(2, group.inverse)
        lse[group.rows] = F.pad(logs, (0, n - group.length), value=float("-inf"))
    return out, lse


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, rule: list[int], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op(
    "attnlab::neighborhood_by_length_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? bias, Tensor out, Tensor lse, Tensor dout, "
    "Tensor dlse, int[] rule, bool causal, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    rule: list[int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the bias (empty without one)."""
    found = [t.new_zeros(t.shape) for t in (q, k, v)]
    to_bias = q.new_empty(0) if bias is None else torch.zeros_like(bias)
    for group in _groups(mask, q, bias, rule, causal):
        queries, keys, kind, term, index = group.tiles
        real = mask[group.rows, : group.length]
        tokens = (group.cut(q), group.cut(k), group.cut(v))
        logs = group.to_tiles(lse).masked_fill(queries < 0, float("-inf"))
        given = (group.to_tiles(out), logs, group.to_tiles(dout), group.to_tiles(dlse))
        options = (False, False, scale, "eager", bias is not None)
        *gradients, to_term = frame.backward(*tokens, queries, keys, term, kind, real, *given, *options)
        for total, gradient in zip(found, gradients, strict=True):
            total[group.rows, :, : group.length] = gradient
        if bias is not None:
            shown = to_term.masked_fill(term == float("-inf"), 0).flatten(1)
            group.axis.table(to_bias, 1).index_add_(1, index.flatten(), shown.to(bias.dtype))
    return found[0], found[1], found[2], to_bias


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    rule: list[int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    to_bias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), to_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, mask, bias, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    dq, dk, dv, to_bias = _backward(q, k, v, mask, bias, out, lse, dout, dlse, *ctx.options)
    return dq, dk, dv, None, None if bias is None else to_bias, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
