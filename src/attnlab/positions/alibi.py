"""ALiBi: a penalty on the logits that grows linearly with the distance, with a slope a head."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.core.grid import Grid
from attnlab.ops.attention import Pairwise
from attnlab.positions.base import Position, offsets_between, positions


def alibi_slopes(num_heads: int) -> list[float]:
    """Slopes 2^(-8 h / H), h = 1..H, for H a power of two; otherwise those of the power below, then every second of twice it."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    between = [2.0 ** (-8.0 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return slopes + between[: num_heads - power]


@positions.register("alibi", family="bias")
class Alibi(Position):
    r"""Attention with linear biases (Press et al. 2021, section 3): $-m_h\,|i - j|$ is added to the logits of head h.

    Args:
        num_heads: heads of the attention, each with its own slope.
        head_dim: width of a query; not used.
    """

    slopes: Tensor

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__(num_heads, head_dim)
        self.register_buffer("slopes", torch.tensor(alibi_slopes(num_heads)), persistent=False)

    def bias(self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None) -> Pairwise:
        """The penalties by offset."""
        distance = offsets_between(q.shape[2], num_keys, q.device).abs()
        return Pairwise(offsets=-self.slopes.to(q.dtype)[:, None] * distance)
