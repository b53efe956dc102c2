"""Linear maps over a fixed list of slots: one map a slot, or one map over all of them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SlotLinear(nn.Module):
    r"""Every slot has a map of its own: $y_i = W_i x_i + b_i$.

    Args:
        num_slots: L.
        in_features: width of the tokens.
        out_features: width of the results.
        bias: whether $b_i$ is there.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_slots: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        bound = in_features**-0.5
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_slots, out_features, in_features, **place).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_slots, out_features, **place).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b l o"]:
        """Each token through the map of its slot."""
        y = torch.bmm(x.transpose(0, 1), self.weight.mT).transpose(0, 1)
        return y if self.bias is None else y + self.bias


class CompositeLinear(nn.Module):
    r"""Every result reads all slots: $(y_1, \dots, y_L) = W_2 W_1 (x_1, \dots, x_L)$, joined along the width; no biases.

    Args:
        num_slots: L.
        in_features: width of the tokens.
        out_features: width of the results.
        rank: rows of $W_1$; None for one full matrix (L out_features, L in_features).
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_slots: int,
        in_features: int,
        out_features: int,
        *,
        rank: int | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_slots = num_slots
        wide, out = num_slots * in_features, num_slots * out_features
        self.down = None if rank is None else nn.Linear(wide, rank, bias=False, **place)
        self.up = nn.Linear(wide if rank is None else rank, out, bias=False, **place)

    def forward(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b l o"]:
        """All tokens at once, and the result cut back into slots."""
        joined = x.flatten(1)
        return self.up(joined if self.down is None else self.down(joined)).unflatten(-1, (self.num_slots, -1))
