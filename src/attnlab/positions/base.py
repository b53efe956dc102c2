"""The interface of a position: what it does to queries and keys, and what it adds to the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.core.registry import Registry

positions: Registry[Position] = Registry("position", "attnlab.positions")


class Position(nn.Module):
    """A source of position information for attention.

    `encode` sees queries and keys once, before keys are cached; `bias` sees the queries and the number of keys. A subclass
    overrides one of them, or both.

    Args:
        num_heads: heads of the attention.
        head_dim: width of a query.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim

    def encode(self, x: Float[Tensor, "b h n d"], index: Int[Tensor, "#b n"]) -> Float[Tensor, "b h n d"]:
        """Queries or keys with their position in them; ``index`` counts tokens from the start of the sequence."""
        return x

    def bias(
        self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None
    ) -> Float[Tensor, "#b h n m"] | None:
        """What is added to the scaled logits, with query i standing at key position i + num_keys - n; None for nothing."""
        return None


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
