"""A linear recurrence whose transition is one dense matrix, the same at every token."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def dense_recurrence(inputs: Float[Tensor, "b n s"], transition: Float[Tensor, "s s"]) -> Float[Tensor, "b n s"]:
    r"""$h_t = A h_{t-1} + u_t$ from $h_0 = 0$, in about $2 \sqrt n$ steps.

    Some $\sqrt n$ pieces run side by side from zero states; then their last states are carried on, and each token of a piece
    gets what the powers of A leave of the state before it. Time O(n s^2), twice that of the recurrence; memory O(n s).

    Args:
        inputs: u.
        transition: A. Where its spectral radius is above 1, states grow without bound, as they do by definition.
    """
    batch, n, size = inputs.shape
    steps = max(1, math.isqrt(n))
    pieces = -(-n // steps)
    padded = torch.nn.functional.pad(inputs, (0, 0, 0, pieces * steps - n)).view(batch, pieces, steps, size)
    state, local = torch.zeros_like(padded[:, :, 0]), []
    for token in padded.unbind(2):
        state = state @ transition.mT + token
        local.append(state)
    powers = _powers(transition, steps)
    carry, before = torch.zeros_like(inputs[:, 0]), []
    for last in local[-1].unbind(1):
        before.append(carry)
        carry = carry @ powers[-1].mT + last
    carried = torch.einsum("tij,bpj->bpti", powers, torch.stack(before, 1))
    return (torch.stack(local, 2) + carried).flatten(1, 2)[:, :n]


def _powers(matrix: Float[Tensor, "s s"], count: int) -> Float[Tensor, "t s s"]:
    """$A, A^2, \\dots, A^{count}$."""
    powers = matrix[None]
    while len(powers) < count:
        powers = torch.cat((powers, powers[: count - len(powers)] @ powers[-1]))
    return powers
