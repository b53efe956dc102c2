"""A linear recurrence with the same transition at every token."""

from __future__ import annotations

import math

import torch
from jaxtyping import Inexact
from torch import Tensor


def linear_recurrence(
    inputs: Inexact[Tensor, "b n s"],
    transition: Inexact[Tensor, "s s"] | Inexact[Tensor, "s"],
    initial: Inexact[Tensor, "b s"] | None = None,
) -> Inexact[Tensor, "b n s"]:
    r"""$h_t = A h_{t-1} + u_t$ in about $2 \sqrt n$ steps.

    Some $\sqrt n$ pieces run side by side from zero states; then their last states are carried on, and each token of a piece
    gets what the powers of A leave of the state before it. Time O(n s^2), or O(n s) for a diagonal A, twice that of the
    recurrence; memory O(n s).

    Args:
        inputs: u, real or complex.
        transition: A, or its diagonal. Where its spectral radius is above 1, states grow without bound, as they do by definition.
        initial: the state before the first token, zeros if None.
    """
    batch, n, size = inputs.shape
    steps = max(1, math.isqrt(n))
    pieces = -(-n // steps)
    missing = inputs.new_zeros(batch, pieces * steps - n, size)
    state, local = torch.zeros_like(inputs[:, :1]), []
    for token in torch.cat((inputs, missing), 1).view(batch, pieces, steps, size).unbind(2):
        state = _apply(transition, state) + token
        local.append(state)
    powers = _powers(transition, steps)
    carry, before = torch.zeros_like(inputs[:, 0]) if initial is None else initial, []
    for last in local[-1].unbind(1):
        before.append(carry)
        carry = _apply(powers[-1], carry) + last
    starts = torch.stack(before, 1)
    carried = torch.einsum("tij,bpj->bpti" if transition.ndim == 2 else "ti,bpi->bpti", powers, starts)
    return (torch.stack(local, 2) + carried).flatten(1, 2)[:, :n]


def _apply(transition: Tensor, states: Tensor) -> Tensor:
    return states * transition if transition.ndim == 1 else states @ transition.mT


def _powers(transition: Tensor, count: int) -> Tensor:
    """A, A^2, ..., A^count, one behind the other."""
    powers = transition[None]
    while len(powers) < count:
        more = powers[: count - len(powers)]
        powers = torch.cat((powers, more * powers[-1] if transition.ndim == 1 else more @ powers[-1]))
    return powers
