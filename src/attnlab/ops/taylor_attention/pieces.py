r"""Second-order attention and its gradient piece by piece, for tensors (heads, n, width).

Here features are plain products, $\varphi(x) = [1, x_a, x_a x_b]_{a \le b}$, and the state T sums $\varphi(k_j) v_j^\top$; the
weights $\omega = [1, d^{-1/2}, d^{-1}\, (\tfrac12 \text{ if } a = b)]$ act where it is read, $o = \varphi(q)^\top (\omega T)$.
A piece's features are written to one buffer, tokens innermost, so that each product of channels is one long multiplication.

The gradient of $\varphi(x)^\top M y$ for x needs no features: it is $\sum_{b,e} M_{abe} (1 + \delta_{ab})\, x_b\, y_e$, b running
over the channels and a one, a product with the matrix of all $x_b y_e$. With it the queries get theirs of $M = \omega T$ before
their piece and y = do, the keys of the gradient R of T after their piece and y = v.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.ops.chunks import full_precision, head_groups

CAUSAL = 256  # tokens of a piece where causal: more cost more pairs, fewer more states to keep
TOKENS = 1024  # of all heads that a piece takes together: few enough for the features to stay in cache

Rows = Float[Tensor, "bh n d"]
Piece = Float[Tensor, "g p _"]
States = Float[Tensor, "bh w e"]


class Tables(NamedTuple):
    """For a width d: the weights of the plain features, and the rows of a state that `through` takes, with their factors."""

    weight: Float[Tensor, "w 1"]
    rows: Int[Tensor, " dd1"]
    factor: Float[Tensor, "dd1 1"]

    @classmethod
    def build(cls, like: Float[Tensor, "... d"]) -> Tables:
        """The tables in the dtype and on the device of ``like``."""
        d, device = like.shape[-1], like.device
        a, b = torch.triu_indices(d, d, device=device).unbind()
        place = torch.empty(d, d + 1, dtype=torch.int64, device=device)
        place[a, b] = place[b, a] = 1 + d + torch.arange(len(a), device=device)
        place[:, d] = 1 + torch.arange(d, device=device)
        factor = like.new_ones(d, d + 1)
        factor.diagonal().fill_(2.0)
        squares = torch.where(a == b, 0.5, 1.0).to(like.dtype) / d
        weight = torch.cat((like.new_ones(1), like.new_full((d,), d**-0.5), squares))
        return cls(weight[:, None], place.flatten(), factor.view(-1, 1))


class Memory:
    """One buffer for what pieces write, as large as the largest of them, used again and again."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """Room of this shape; what was there before is lost."""
        count = 1
        for size in shape:
            count *= size
        if self.buffer is None or self.buffer.numel() < count:
            self.buffer = like.new_empty(count)
        return self.buffer[:count].view(shape)


def width(d: int) -> int:
    """How many features there are."""
    return 1 + d + d * (d + 1) // 2


def features(x: Piece, memory: Memory) -> Float[Tensor, "g w p"]:
    """Plain features, tokens innermost, in ``memory``."""
    (g, p, d), x = x.shape, x.mT.contiguous()
    found = memory.take(x, g, width(d), p)
    found[:, 0] = 1.0
    found[:, 1 : d + 1] = x
    start = d + 1
    for a in range(d):
        torch.mul(x[:, a:], x[:, a : a + 1], out=found[:, start : start + d - a])
        start += d - a
    return found


def through(x: Piece, y: Piece, state: States, tables: Tables, memory: Memory) -> Piece:
    r"""The gradient of $\varphi(x)^\top M y$ for x, M the ``state``."""
    (g, p, d), e = x.shape, y.shape[-1]
    outer = memory.take(x, g, d + 1, e, p)
    across = y.mT.contiguous().unsqueeze(1)
    torch.mul(x.mT.contiguous().unsqueeze(2), across, out=outer[:, :d])
    outer[:, d:] = across
    taken = (state.index_select(1, tables.rows) * tables.factor).view(g, d, -1)
    return torch.bmm(taken, outer.flatten(1, 2)).mT


def read(state: States, found: Float[Tensor, "g w p"]) -> Piece:
    """What features read of a state; products with tokens innermost take two thirds of the time of those with rows of tokens."""
    return torch.bmm(state.mT, found).mT


def written(found: Float[Tensor, "g w p"], y: Piece) -> States:
    """What features write of the values y to a state."""
    return torch.bmm(y.mT.contiguous(), found.mT).mT


def cuts(length: int, size: int) -> list[slice]:
    """The pieces of a sequence."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def plan(q: Rows, causal: bool) -> tuple[list[slice], int]:
    """Heads that are taken together, and the tokens of a piece."""
    size = CAUSAL if causal else TOKENS
    return head_groups(q.shape[0], q.shape[0] if q.is_cuda else max(1, TOKENS // min(size, q.shape[1]))), size


@full_precision
def forward(
    q: Rows, k: Float[Tensor, "bh m d"], v: Float[Tensor, "bh m e"], state: States | None, causal: bool
) -> tuple[Float[Tensor, "bh n e"], States, Float[Tensor, "bh starts w e"]]:
    """Output, last state, and where causal the states before all pieces."""
    (bh, n, d), e = q.shape, v.shape[-1]
    tables, memory = Tables.build(q), Memory()
    o, last = q.new_empty(bh, n, e), q.new_zeros(bh, width(d), e) if state is None else state.clone()
    starts = q.new_zeros(bh, n // CAUSAL + 1 if causal else 0, width(d), e)
    groups, size = plan(q, causal)
    for heads in groups:
        current = last[heads]
        for number, piece in enumerate(cuts(k.shape[1], size)):
            keys, values = k[heads, piece], v[heads, piece]
            if causal:
                starts[heads, number] = current
                out = torch.bmm(_pairs(q[heads, piece], keys)[1], values)
                if number or state is not None:
                    out += read(current * tables.weight, features(q[heads, piece], memory))
                o[heads, piece] = out
            current += written(features(keys, memory), values)
        if not causal:
            weighed = current * tables.weight
            for piece in cuts(n, size):
                o[heads, piece] = read(weighed, features(q[heads, piece], memory))
    return o, last, starts


def _pairs(q: Piece, k: Piece) -> tuple[Float[Tensor, "g p p"], Float[Tensor, "g p p"]]:
    """The scores and the weights of a piece's own tokens."""
    scores = torch.bmm(q, k.mT).mul_(q.shape[-1] ** -0.5)
    return scores, scores.mul(0.5).add_(1.0).mul_(scores).add_(1.0).tril_()


@full_precision
def backward(
    grad_o: Float[Tensor, "bh n e"],
    grad_last: States,
    q: Rows,
    k: Float[Tensor, "bh m d"],
    v: Float[Tensor, "bh m e"],
    last: States,
    starts: Float[Tensor, "bh starts w e"],
    causal: bool,
    fresh: bool,
) -> tuple[Rows, Float[Tensor, "bh m d"], Float[Tensor, "bh m e"], States]:
    """Gradients of q, k, v and the first state, which was zero if ``fresh``."""
    tables, memory = Tables.build(q), Memory()
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    grad_state = grad_last.clone()
    groups, size = plan(q, causal)
    for heads in groups:
        current = grad_state[heads]  # of the sums after the piece, in place
        weighed = last[heads] * tables.weight
        for number, piece in reversed(list(enumerate(cuts(q.shape[1], size)))):
            queries, above = q[heads, piece], grad_o[heads, piece]
            if causal:
                grads = _backward_pairs(queries, k[heads, piece], v[heads, piece], above)
                grad_k[heads, piece], grad_v[heads, piece] = _of_keys(
                    k[heads, piece], v[heads, piece], current, tables, memory, grads[1:]
                )
                grad_q[heads, piece] = grads[0]
                if number == 0 and fresh:
                    continue  # nothing before it, and no one to tell
                weighed = starts[heads, number] * tables.weight
                grad_q[heads, piece] += through(queries, above, weighed, tables, memory)
            else:
                grad_q[heads, piece] = through(queries, above, weighed, tables, memory)
            current.addcmul_(written(features(queries, memory), above), tables.weight)
        if not causal:
            for piece in cuts(k.shape[1], size):
                grad_k[heads, piece], grad_v[heads, piece] = _of_keys(k[heads, piece], v[heads, piece], current, tables, memory)
    return grad_q, grad_k, grad_v, grad_state


def _of_keys(
    k: Piece, v: Piece, grad: States, tables: Tables, memory: Memory, more: tuple[Piece, Piece] | None = None
) -> tuple[Piece, Piece]:
    """Gradients of keys and values from that of the state which they were added to, plus ``more``."""
    grad_k, grad_v = through(k, v, grad, tables, memory), read(grad, features(k, memory))
    return (grad_k, grad_v) if more is None else (grad_k.add_(more[0]), grad_v.add_(more[1]))


def _backward_pairs(q: Piece, k: Piece, v: Piece, grad_o: Piece) -> tuple[Piece, Piece, Piece]:
    """Gradients of q, k, v from the outputs of their own piece."""
    scores, weights = _pairs(q, k)
    grad = torch.bmm(grad_o, v.mT).mul_(scores.add_(1.0)).mul_(q.shape[-1] ** -0.5).tril_()
    return torch.bmm(grad, k), torch.bmm(grad.mT, q), torch.bmm(weights.mT, grad_o)
