"""A number for each pair of query and key, stored by what it depends on: the pair, the offset, or the query and the offset."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Pairwise:
    r"""The sum of up to three terms, so that n x m numbers need not be stored where fewer say the same.

    With $r = j - i$ the position of the key minus that of the query (the last query stands at the last key), row
    $r + m - 1$ of a table of n + m - 1 rows belongs to $r$, from $-(m - 1)$ to $n - 1$.

    Args:
        dense: $b_{ij}$, broadcastable to (b, h, n, m).
        offsets: $t_{hr}$, (h or 1, n + m - 1): a Toeplitz matrix a head.
        keys: $e_{hr}$, (h or 1, n + m - 1, d), added to the key of the pair: the logit gains $s\, q_i^\top e_{j-i}$.
    """

    dense: Float[Tensor, "#b #h #n #m"] | None = None
    offsets: Float[Tensor, "#h r"] | None = None
    keys: Float[Tensor, "#h r d"] | None = None

    @staticmethod
    def of(term: Tensor | Pairwise | None) -> Pairwise:
        """A tensor as a dense term, nothing as no term."""
        return term if isinstance(term, Pairwise) else Pairwise(dense=term)

    def scaled(self, factor: float) -> Pairwise:
        """``dense`` and ``offsets`` times ``factor``; ``keys`` follow the scale of the products anyway."""
        dense = None if self.dense is None else self.dense * factor
        return replace(self, dense=dense, offsets=None if self.offsets is None else self.offsets * factor)

    def plus(self, dense: Float[Tensor, "#b #h #n #m"]) -> Pairwise:
        """With one more dense term."""
        return replace(self, dense=dense if self.dense is None else self.dense + dense)

    @property
    def by_offset(self) -> bool:
        """Whether a term is stored by offset."""
        return self.offsets is not None or self.keys is not None

    def expanded(self, q: Float[Tensor, "b h n d"], num_keys: int, scale: float) -> Float[Tensor, "#b #h #n #m"] | None:
        """All terms as one dense tensor, or None: the definition, for small inputs."""
        total = self.dense
        rows = torch.arange(q.shape[2], device=q.device).flip(0).unsqueeze(1)
        index = rows + torch.arange(num_keys, device=q.device)
        if self.offsets is not None:
            term = self.offsets[:, index][None]
            total = term if total is None else total + term
        if self.keys is not None:
            by_offset = torch.einsum("bhnd,hrd->bhnr", q * scale, self.keys.expand(q.shape[1], -1, -1))
            term = by_offset.gather(-1, index.expand(*q.shape[:2], -1, -1))
            total = term if total is None else total + term
        return total


def check_pairwise(name: str, term: Pairwise, shape: tuple[int, int, int, int], width: int | None) -> None:
    """Refuse (ValueError) terms that do not fit (b, h, n, m); ``width`` None refuses keys."""
    _, h, n, m = shape
    if term.dense is not None:
        have = tuple(term.dense.shape)
        if len(have) != 4 or any(size not in (1, full) for size, full in zip(have, shape, strict=True)):
            raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {have}")
    if term.offsets is not None and (term.offsets.dim() != 2 or term.offsets.shape[0] not in (1, h)):
        raise ValueError(f"{name}.offsets: expected shape ({h} or 1, {n + m - 1}), got {tuple(term.offsets.shape)}")
    if term.offsets is not None and term.offsets.shape[1] != n + m - 1:
        raise ValueError(f"{name}.offsets: expected n + m - 1 = {n + m - 1} rows, got {term.offsets.shape[1]}")
    if term.keys is None:
        return
    if width is None:
        raise ValueError(f"{name}.keys: expected None, keys belong to a bias")
    if term.keys.dim() != 3 or term.keys.shape[0] not in (1, h) or tuple(term.keys.shape[1:]) != (n + m - 1, width):
        raise ValueError(f"{name}.keys: expected shape ({h} or 1, {n + m - 1}, {width}), got {tuple(term.keys.shape)}")
