"""A mechanism of one's own: each token gets the mean of the values so far."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnlab
from attnlab.core.catalog import mixers


@mixers.register(
    "running_mean",
    family="recurrent",
    supports=attnlab.Supports(causal="always", streaming=True, state="bounded", cost=1.0),
)
class RunningMean(attnlab.StreamingMixer):
    r"""Causal mean pooling: $y_i = W_o \frac{1}{i + 1} \sum_{j \le i} W_v x_j$.

    Args:
        dim: width of the tokens.
        num_heads: of the common signature; there are no heads.
        causal: always True.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        self.value = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> attnlab.State:
        """Nothing summed, nothing counted."""
        zeros = torch.zeros(batch_size, self.dim + 1, device=device, dtype=dtype)
        return attnlab.State({"sum": zeros[:, 1:], "count": zeros[:, :1]})

    def advance(self, x: Tensor, state: attnlab.State, *, mask: Tensor | None) -> tuple[Tensor, attnlab.State]:
        """Add the new tokens and divide."""
        real = torch.ones_like(x[..., :1]) if mask is None else mask.unsqueeze(-1).to(x.dtype)
        total = state["sum"].unsqueeze(1) + self.value(x).cumsum(1)  # x is 0 at masked tokens
        count = state["count"].unsqueeze(1) + real.cumsum(1)
        return self.out(total / count.clamp(min=1)), attnlab.State({"sum": total[:, -1], "count": count[:, -1]})
