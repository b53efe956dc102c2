"""Seeded draws of sizes, grids, masks and splits."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.core.grid import Grid

MASKS = ("right", "left", "inside")
"""Where the masked tokens of an example are."""

_GRIDS: dict[int, tuple[Grid, ...]] = {
    1: ((7,), (9,), (11,), (13,)),
    2: ((3, 4), (2, 5), (5, 3), (4, 2)),
    3: ((2, 3, 2), (3, 2, 2), (2, 2, 3)),
}


class Draw:
    """Random things, the same for the same seed.

    Args:
        seed: of its own generator; the global one is left alone.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def normal(self, *shape: int) -> Float[Tensor, "..."]:
        """Standard normal numbers in float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def grid(self, rank: int) -> Grid:
        """A small grid whose sides differ."""
        return _GRIDS[rank][self.integer(0, len(_GRIDS[rank]) - 1)]

    def permutation(self, n: int) -> Int[Tensor, "n"]:
        """A permutation of n >= 2 things that moves some."""
        while True:
            order = torch.randperm(n, generator=self.generator)
            if not torch.equal(order, torch.arange(n)):
                return order

    def mask(self, kind: str, batch: int, n: int) -> Bool[Tensor, "b n"]:
        """True at real tokens. Each example has at least one, and (for n >= 2) at least one that is masked.

        Args:
            kind: where the masked ones are: "right", "left", or "inside" (anywhere).
            batch: examples.
            n: tokens.
        """
        if n == 1:
            return torch.ones(batch, 1, dtype=torch.bool)
        rows = []
        for _ in range(batch):
            real = torch.arange(n) < self.integer(1, n - 1)
            if kind == "left":
                real = real.flip(0)
            elif kind == "inside":
                real = real[self.permutation(n)]
            rows.append(real)
        return torch.stack(rows)

    def pair_mask(self, *shape: int) -> Bool[Tensor, "b h n m"]:
        """Random pairs, about half of them allowed; every query keeps at least one key."""
        allowed = torch.rand(shape, generator=self.generator) < 0.5
        one = torch.randint(0, shape[-1], shape[:-1], generator=self.generator)
        return allowed.scatter(-1, one.unsqueeze(-1), True)

    def split(self, n: int) -> list[int]:
        """Lengths of at least two pieces that add up to n >= 2."""
        pieces = [self.integer(1, n - 1)]
        while left := n - sum(pieces):
            pieces.append(self.integer(1, left))
        return pieces
