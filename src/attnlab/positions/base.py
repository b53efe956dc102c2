"""The interface of a position: what it does to queries and keys, logits, weights and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.core.registry import Registry
from attnlab.ops.attention import Pairwise

positions: Registry[Position] = Registry("position", "attnlab.positions")


class Position(nn.Module):
    """A source of position information for attention, in up to four places; a subclass overrides those that it uses.

    `encode` sees queries and keys once, before keys are cached; `bias` adds to the logits, `factor` multiplies the weights after
    the normaliser, `local` adds to what the heads make of the values.

    Args:
        num_heads: heads of the attention.
        head_dim: width of a query.
    """

    reads_future: ClassVar[bool] = False
    """Whether it mixes in later tokens by itself, so that no causal attention can have it."""
    skips_padding: ClassVar[bool] = False
    """Whether ``index`` counts real tokens alone, so that padding on the left shifts nothing; distances need not care."""
    reads_values: ClassVar[bool] = False
    """Whether it overrides `local`."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim

    def encode(self, x: Float[Tensor, "b h n d"], index: Int[Tensor, "#b n"]) -> Float[Tensor, "b h n d"]:
        """Queries or keys with their position in them; ``index`` counts tokens from the start of the sequence."""
        return x

    def bias(
        self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None
    ) -> Float[Tensor, "#b #h #n #m"] | Pairwise | None:
        """What is added to the scaled logits, with query i standing at key position i + num_keys - n; None for nothing."""
        return None

    def factor(
        self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None
    ) -> Float[Tensor, "#b #h #n #m"] | Pairwise | None:
        """What multiplies the weights after the normaliser, for the same pairs; None for nothing."""
        return None

    def local(self, v: Float[Tensor, "b h m e"], grid: Grid | None, mask: Bool[Tensor, "b m"] | None) -> Float[Tensor, "b h m e"]:
        """What the values' neighbourhoods add to the head outputs in self-attention; masked tokens count as zero."""
        return torch.zeros_like(v)

    def grid_of_rank(self, grid: Grid | None, rank: int) -> Grid:
        """The grid, refused (ValueError) if it does not have the rank that this position was built for."""
        if grid is None or len(grid) != rank:
            raise ValueError(f"grid: {type(self).__name__} was built for rank {rank}, got {grid}; give rank= or another grid=")
        return grid


def offsets_between(num_queries: int, num_keys: int, device: torch.device) -> Int[Tensor, "r"]:
    """Key position minus query position of each row of a table by offset (`Pairwise`): -(m - 1) to n - 1."""
    return torch.arange(1 - num_keys, num_queries, device=device)


@positions.register("none", family="none")
class NoPosition(Position):
    """No position: the attention sees a set."""


def create_position(name: str, num_heads: int, head_dim: int, options: Mapping[str, Any] | None = None) -> Position:
    """Build a registered position.

    Args:
        name: "none", "rotary", "alibi", "relative", ...
        num_heads: heads of the attention that takes it.
        head_dim: width of a query.
        options: the position's own options.

    Raises:
        UnknownNameError: for an unknown name or option; the nearest ones are named.
    """
    return positions.create(name, num_heads=num_heads, head_dim=head_dim, **(options or {}))
