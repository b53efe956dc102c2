"""Learned maps of whole rows: a function of one variable on each edge from an entry of the row to an entry of the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.mixers.parts.univariate import WAVELETS, safe_pade

BASES = ("fourier", "rational", *WAVELETS)
RESIDUALS: dict[str, Callable[[Tensor], Tensor] | None] = {"zero": None, "identity": lambda x: x, "silu": F.silu, "gelu": F.gelu}
_NUMERATOR, _DENOMINATOR = 6, 4  # coefficients of the rational functions of degrees (5, 4)


class KolmogorovArnoldRows(nn.Module):
    r"""$u_p = \sum_q \varphi_{pq}(a_q)$ for every row a of N entries, a head's own functions (Maity et al. 2025, KArAt).

    Full: p = 1..N and the result is u. Modular, of rank r: p = 1..r and the result is $W u$, $W \in \mathbb{R}^{N \times r}$.

    $$\varphi_{pq}(x) = b_{pq}\, b(x) + c_{pq}\, f_{pq}(x), \qquad
      f_{pq}(x) = \sum_{m=1}^{G} \alpha_{pqm} \cos(m x) + \beta_{pqm} \sin(m x)$$

    or $f_{pq}$ a rational function of degrees (5, 4), or a wavelet $w_{pq}\,\psi((x - \tau_{pq}) / s_{pq})$ (`WAVELETS`).
    Coefficients and weights w are drawn from N(0, 1), shifts begin at 0, scales at 1. Fourier functions are two matrix products a
    frequency; the others are formed edge by edge, a p at a time: time and saved memory of r N evaluations a row.

    Args:
        num_heads: heads.
        num_tokens: N.
        basis: one of `BASES`.
        rank: r; None for the full form, with N^2 functions a head.
        num_frequencies: G, of the basis "fourier".
        residual: b, one of "zero", "identity", "silu", "gelu".
        edge_weights: whether $b_{pq}$ and $c_{pq}$ are learned, or 1.

    Raises:
        ValueError: for unknown names or sizes below 1.
    """

    def __init__(
        self,
        num_heads: int,
        num_tokens: int,
        *,
        basis: str = "fourier",
        rank: int | None = 12,
        num_frequencies: int = 3,
        residual: str = "zero",
        edge_weights: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if basis not in BASES:
            raise ValueError(f"basis: expected one of {BASES}, got {basis!r}")
        if residual not in RESIDUALS:
            raise ValueError(f"residual: expected one of {tuple(RESIDUALS)}, got {residual!r}")
        for name, value in (
            ("num_tokens", num_tokens),
            ("rank", 1 if rank is None else rank),
            ("num_frequencies", num_frequencies),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = num_tokens if rank is None else rank
        edges = (num_heads, rows, num_tokens)
        self.num_heads, self.num_tokens, self.basis, self.residual = num_heads, num_tokens, basis, residual

        def normal(*first: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*first, *edges, **place))

        if basis == "fourier":
            self.cosine, self.sine = normal(num_frequencies), normal(num_frequencies)
        elif basis == "rational":
            self.numerator, self.denominator = normal(_NUMERATOR), normal(_DENOMINATOR)
        else:
            self.weight = normal()
            self.shift = nn.Parameter(torch.zeros(edges, **place))
            self.scale = nn.Parameter(torch.ones(edges, **place))
        self.residual_weight = nn.Parameter(torch.ones(edges, **place)) if edge_weights else None
        self.function_weight = nn.Parameter(torch.ones(edges, **place)) if edge_weights else None
        self.up: nn.Parameter | None = None
        if rank is not None:
            self.up = nn.Parameter(torch.empty(num_heads, num_tokens, rank, **place).uniform_(-(rank**-0.5), rank**-0.5))

    def forward(
        self, rows: Float[Tensor, "b h n m"], allowed: Bool[Tensor, "#b #h #n #m"] | None = None
    ) -> Float[Tensor, "b h n m"]:
        """The result for each row. Entries that are not allowed are in no sum, and 0 in the result."""
        if rows.shape[1] != self.num_heads or rows.shape[3] != self.num_tokens:
            expected = (self.num_heads, self.num_tokens)
            raise ValueError(f"rows: expected {expected[0]} heads and rows of {expected[1]}, got shape {tuple(rows.shape)}")
        if allowed is not None:
            rows = rows.masked_fill(~allowed, 0.0)
        total = self._fourier(rows, allowed) if self.basis == "fourier" else self._edges(rows, allowed)
        if (function := RESIDUALS[self.residual]) is not None:
            extra = _kept(function(rows), allowed)
            weight = self.residual_weight
            total = total + (extra.sum(dim=-1, keepdim=True) if weight is None else extra @ weight.mT)
        if self.up is not None:
            total = total @ self.up.mT
        return _kept(total, allowed)

    def _fourier(self, rows: Float[Tensor, "b h n m"], allowed: Tensor | None) -> Float[Tensor, "b h n r"]:
        cosine: Tensor = self.cosine
        sine: Tensor = self.sine
        if self.function_weight is not None:
            cosine, sine = cosine * self.function_weight, sine * self.function_weight
        total = rows.new_zeros(())
        for m, (c, s) in enumerate(zip(cosine.unbind(), sine.unbind(), strict=True), start=1):
            angles = m * rows
            total = total + _kept(angles.cos(), allowed) @ c.mT + _kept(angles.sin(), allowed) @ s.mT
        return total

    def _edges(self, rows: Float[Tensor, "b h n m"], allowed: Tensor | None) -> Float[Tensor, "b h n r"]:
        if self.basis == "rational":
            coefficients = zip(self.numerator.unbind(2), self.denominator.unbind(2), strict=True)
            values = (safe_pade(rows, a.unsqueeze(2), b.unsqueeze(2)) for a, b in coefficients)
        else:
            wavelet, parts = WAVELETS[self.basis], (self.weight, self.shift, self.scale)
            edges = zip(*(part.unsqueeze(2).unbind(1) for part in parts), strict=True)
            values = (w * wavelet((rows - shift) / scale) for w, shift, scale in edges)
        sums = []
        for p, value in enumerate(values):
            weighted = value if self.function_weight is None else value * self.function_weight[:, p, None]
            sums.append(_kept(weighted, allowed).sum(dim=-1))
        return torch.stack(sums, dim=-1)


def _kept(x: Float[Tensor, "b h n m"], allowed: Bool[Tensor, "#b #h #n #m"] | None) -> Float[Tensor, "b h n m"]:
    return x if allowed is None else x.masked_fill(~allowed, 0.0)
