"""Feature maps of queries and keys."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def elu_plus_one(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    r"""$\mathrm{elu}(x) + 1$: x + 1 above 0, exp(x) below; positive everywhere.

    Written out because the compiler's shape rule for torch's own elu gives its gradient another memory layout than it has.
    """
    return torch.where(x > 0, x + 1.0, x.clamp(max=0.0).exp())
