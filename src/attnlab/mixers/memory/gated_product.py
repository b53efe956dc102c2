"""The gate between attention and memory in Titans."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
"""Non-linearities of the gate by name."""


class GatedProduct(nn.Module):
    r"""$y \otimes m = \sigma(\mathrm{RMSNorm}(y)) \odot \sigma(\mathrm{RMSNorm}'(m))$, norms with weights of their own.

    Args:
        dim: width of both.
        gate: sigma: "silu", "sigmoid" or "tanh".
    """

    def __init__(
        self, dim: int, gate: str = "silu", *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"gate: expected one of {list(GATES)}, got {gate!r}")
        self.gate = gate
        self.attention_norm = nn.RMSNorm(dim, device=device, dtype=dtype)
        self.memory_norm = nn.RMSNorm(dim, device=device, dtype=dtype)

    def forward(self, y: Float[Tensor, "b n c"], m: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The product of attention's output and memory's."""
        function, dtype = GATES[self.gate], self.memory_norm.weight.dtype  # autocast would hand the norms another
        return function(self.attention_norm(y.to(dtype))) * function(self.memory_norm(m.to(dtype)))
