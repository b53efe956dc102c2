r"""Normalisers of linear attention: what becomes of the sums that a query reads.

For query i with features $\phi(q_i)$, over the c keys that it may use,

$$N_i = \phi(q_i)^\top \sum_j \phi(k_j) v_j^\top, \quad S_i = \phi(q_i)^\top \sum_j \phi(k_j), \quad V_i = \sum_j v_j .$$

Each is linear in N and V, so that it defines weights of the keys. Without any key N, S and V are 0, and so is the output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Sums(NamedTuple):
    """What a query reads.

    Args:
        products: N (b, h, n, e).
        weight: S (b, h, n, 1).
        values: V (b, h, n or 1, e); empty where the normaliser has no use for it.
        number: c (b, h, n or 1, 1), or 1 where there is no key; empty like ``values``.
    """

    products: Float[Tensor, "b h n e"]
    weight: Float[Tensor, "b h n 1"]
    values: Tensor = torch.empty(0)
    number: Tensor = torch.empty(0)


def divide(products: Float[Tensor, "b h n e"], weight: Float[Tensor, "b h n 1"]) -> Float[Tensor, "b h n e"]:
    """The quotient; 0 where the weight is 0."""
    empty = weight == 0
    return (products / weight.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


class Normalizer(nn.Module):
    """N as it is; the base of the others."""

    needs_values: bool = False
    """Whether it reads V and c."""

    def forward(self, sums: Sums) -> Float[Tensor, "b h n e"]:
        """The output."""
        return sums.products


class Divide(Normalizer):
    r"""$N_i / S_i$, and 0 where $S_i = 0$: weights that sum to one."""

    def forward(self, sums: Sums) -> Float[Tensor, "b h n e"]:
        """The quotient."""
        return divide(sums.products, sums.weight)


class DivideMeans(Normalizer):
    r"""$\frac{N_i / c}{S_i / c + \epsilon}$: weights that sum to nearly one.

    Args:
        eps: $\epsilon$, beside the mean over the keys.
    """

    needs_values = True

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, sums: Sums) -> Float[Tensor, "b h n e"]:
        """The quotient."""
        return sums.products / (sums.weight + self.eps * sums.number)


class Clamp(Normalizer):
    r"""$\tau_h N_i / \max(S_i, m)$: below m no denominator falls (Zheng 2025, L2ViT).

    Args:
        minimum: m > 0.
        num_heads: of the learned $\tau$; None for $\tau = 1$.
        temperature: $\tau$ at first.

    Raises:
        ValueError: for a minimum that is not positive.
    """

    def __init__(
        self,
        minimum: float = 100.0,
        *,
        num_heads: int | None = None,
        temperature: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if minimum <= 0:
            raise ValueError(f"minimum: expected a positive number, got {minimum}")
        self.minimum = minimum
        self.temperature = None
        if num_heads is not None:
            self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), temperature, device=device, dtype=dtype))

    def forward(self, sums: Sums) -> Float[Tensor, "b h n e"]:
        """The quotient, times the temperature of the head."""
        out = sums.products / sums.weight.clamp(min=self.minimum)
        return out if self.temperature is None else out * self.temperature


class Subtract(Normalizer):
    r"""$\frac{s}{c} N_i + (1 - \frac{s}{c} S_i) \frac{V_i}{c}$: weights that sum to one, by subtraction.

    That of injective linear attention (Han et al. 2024, Bridging the Divide, section 4.1).

    Args:
        scale: s.
    """

    needs_values = True

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, sums: Sums) -> Float[Tensor, "b h n e"]:
        """The products, and the mean value for what their weights lack of one."""
        share = self.scale / sums.number
        return share * sums.products + (1.0 - share * sums.weight) * (sums.values / sums.number)


class Magnitude(Normalizer):
    r"""$(1 + \frac{1}{z_i + \epsilon}) \frac{s}{c} N_i - z_i \frac{V_i}{c}$ with $z_i = \frac{s}{c} S_i$.

    Weights that sum to one and sharpen with the length of the query's features; some may be negative (Fan et al. 2025,
    Rectifying Magnitude Neglect).

    Args:
        scale: s.
        eps: $\epsilon$.
    """

    needs_values = True

    def __init__(self, scale: float, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale, self.eps = scale, eps

    def forward(self, sums: Sums) -> Float[Tensor, "b h n e"]:
        """The products times the one factor, less the mean value times the other."""
        share = self.scale / sums.number
        z = share * sums.weight
        return (share * (1.0 + 1.0 / (z + self.eps))) * sums.products - z * (sums.values / sums.number)
