"""A neural memory as its definition reads: one token after the other, each gradient by automatic differentiation."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.neural_memory.memory import MemoryState, Weights, read_memory


def neural_memory(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    alpha: Float[Tensor, "b h n"],
    eta: Float[Tensor, "b h n"],
    theta: Float[Tensor, "b h n"],
    state: MemoryState,
    *,
    chunk: int,
    activation: str,
    mask: Bool[Tensor, "b n"] | None,
) -> tuple[Float[Tensor, "b h n e"], MemoryState]:
    """What `attnlab.ops.neural_memory` documents, differentiated through every step."""
    dtype, wide, (b, n) = v.dtype, accumulate_dtype(v.dtype), (q.shape[0], q.shape[2])
    memory, momentum, anchor, place = state
    place = torch.full((b,), place, device=q.device) if isinstance(place, int) else place
    real = torch.ones(b, n, dtype=torch.bool, device=q.device) if mask is None else mask
    outputs = []
    for i in range(n):
        q_i, k_i, v_i = (x[:, :, i : i + 1].to(wide) for x in (q, k, v))
        forget, keep, step = (x[:, :, i, None, None].to(wide) for x in (alpha, eta, theta))
        here, begins = real[:, i, None, None, None], (real[:, i] & (place == 0))[:, None, None, None]
        anchor = tuple(torch.where(begins, now, old) for now, old in zip(memory, anchor, strict=True))

        def loss(weights: Weights, k_i: Tensor = k_i, v_i: Tensor = v_i) -> Tensor:
            return (read_memory(k_i, weights, activation=activation) - v_i).square().sum()

        surprise = torch.func.grad(loss)(anchor)
        after = [keep * s - step * u for s, u in zip(momentum, surprise, strict=True)]
        memory = tuple(torch.where(here, (1 - forget) * m + s, m) for m, s in zip(memory, after, strict=True))
        momentum = tuple(torch.where(here, s, old) for s, old in zip(after, momentum, strict=True))
        outputs.append(read_memory(q_i, memory, activation=activation))
        place = torch.where(real[:, i], (place + 1) % chunk, place)
    return torch.cat(outputs, 2).to(dtype), MemoryState(memory, momentum, anchor, place)
