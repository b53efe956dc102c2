"""What mixers around a neural memory share: the memory and its options."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import nn

from attnlab.core.info import Supports
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.memory.neural_memory import NeuralMemory
from attnlab.ops.backends import accumulate_dtype

MEMORY = Supports(causal="always", streaming=True, state="bounded", cost=1.0)
"""What memories written by gradients promise: they are not linear in their values, so no matrix mixes these."""


class MemoryOptions(TypedDict, total=False):
    """The options of `MemoryMixer` that a subclass hands on unchanged."""

    causal: bool
    memory_heads: int | None
    depth: int
    expansion: float | int
    chunk: int
    conv_size: int
    activation: str
    momentum: bool
    forgetting: bool
    max_step: float | None
    device: torch.device | None
    dtype: torch.dtype | None


class MemoryMixer(StreamingMixer):
    """A mixer with a neural memory, ``store``; `NeuralMemory` has its equations.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always True.
        memory_heads: heads of the memory; by default ``num_heads``, 1 is one memory for the whole width.
        depth: layers of the memory, 1 to 4; 1 is a matrix.
        expansion: width of its hidden layers relative to that of a head.
        chunk: tokens that share the memory at which gradients are taken; 1 is the recurrence itself.
        conv_size: taps of the short convolutions; 0 for none.
        activation: between the memory's layers: "silu", "gelu" or "tanh".
        momentum: whether past surprise is kept in part; without it, it is forgotten at once.
        forgetting: whether the memory decays.
        max_step: bound of the step sizes; by default 1 / chunk, so that the gradients that a chunk takes at one point add up to
            a step.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for an option out of its range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = True,
        memory_heads: int | None = None,
        depth: int = 2,
        expansion: float | int = 2.0,
        chunk: int = 64,
        conv_size: int = 4,
        activation: str = "silu",
        momentum: bool = True,
        forgetting: bool = True,
        max_step: float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        heads = num_heads if memory_heads is None else memory_heads
        if heads < 1 or dim % heads:
            raise ValueError(f"memory_heads: expected a divisor of dim={dim}, got {heads}")
        self.store = NeuralMemory(
            dim,
            heads,
            depth=depth,
            expansion=expansion,
            chunk=chunk,
            conv_size=conv_size,
            activation=activation,
            momentum=momentum,
            forgetting=forgetting,
            max_step=max_step,
            device=device,
            dtype=dtype,
        )


def placed(options: MemoryOptions) -> dict[str, Any]:
    """Device and dtype for a subclass's own parameters."""
    return {"device": options.get("device"), "dtype": options.get("dtype")}


def for_batch(state: State, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
    """The state of one example for each of a batch: windows in ``dtype``, memories in float32 or wider."""
    tensors = {}
    for name, tensor in state.items():
        kind = dtype if name.startswith("window") else accumulate_dtype(dtype)
        tensor = tensor.to(device, kind if tensor.is_floating_point() else None)
        tensors[name] = tensor.expand(batch_size, *tensor.shape[1:])
    return State(tensors)


def persistent_tokens(
    count: int, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Parameter | None:
    """Learned tokens (count, dim) that are the same for every input, None without any; ValueError for a negative number."""
    if count < 0:
        raise ValueError(f"num_persistent: expected at least 0, got {count}")
    return nn.Parameter(0.02 * torch.randn(count, dim, device=device, dtype=dtype)) if count else None
