"""What a neural memory is between two tokens, its layers, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Weights = tuple[Float[Tensor, "b h _ _"], ...]


class MemoryState(NamedTuple):
    """The memory of every head and example after some tokens; each tuple has a weight (b, h, in, out) a layer.

    Args:
        memory: M, the weights that are read.
        momentum: S, the accumulated surprise.
        anchor: M at the start of the chunk that the next token belongs to, where its gradient is taken; means nothing at place 0.
        place: how many tokens that chunk has already, (b,), or an integer where it is the same for all.
    """

    memory: Weights
    momentum: Weights
    anchor: Weights
    place: Int[Tensor, "b"] | int

    @classmethod
    def fresh(cls, memory: Weights) -> MemoryState:
        """A memory that has seen no token."""
        return cls(memory, tuple(torch.zeros_like(w) for w in memory), memory, 0)


class Activation(NamedTuple):
    """A function between the layers, and its derivative."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _silu_slope(z: Tensor) -> Tensor:
    s = z.sigmoid()
    return s * (1.0 + z * (1.0 - s))


def _gelu_slope(z: Tensor) -> Tensor:
    density = (-0.5 * z.square()).exp() * (2.0 * torch.pi) ** -0.5
    return 0.5 * (1.0 + torch.erf(z * 2.0**-0.5)) + z * density


def _tanh_slope(z: Tensor) -> Tensor:
    return 1.0 - z.tanh().square()


ACTIVATIONS = {
    "silu": Activation(F.silu, _silu_slope),
    "gelu": Activation(F.gelu, _gelu_slope),
    "tanh": Activation(torch.tanh, _tanh_slope),
}
"""Activations between the memory's layers by name; smooth, because the gradient of a gradient is taken."""


def read_memory(x: Float[Tensor, "b h n d"], memory: Weights, *, activation: str = "silu") -> Float[Tensor, "b h n e"]:
    """What the memory gives for the rows of ``x``, without being changed."""
    dtype, function = x.dtype, ACTIVATIONS[activation].value
    x = x.to(memory[0].dtype)
    for weight in memory[:-1]:
        x = function(x @ weight)
    return (x @ memory[-1]).to(dtype)
