"""What travels between blocks and reducers: tokens and what belongs to them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.core.grid import Grid


@dataclass(frozen=True)
class Tokens:
    """Tokens between two blocks.

    Args:
        x: the tokens, (batch, n, channels).
        mask: True marks a real token.
        grid: sides whose product is n without the prefix, or None for a plain sequence.
        num_prefix: leading tokens outside the grid (class and register tokens).
        sizes: how many original tokens each stands for, after merging.
        source: for each original token, the index of the token that holds it now.
        streams: tensors that mixers hand to later blocks, by name (score maps, global tokens).
    """

    x: Float[Tensor, "b n c"]
    mask: Bool[Tensor, "b n"] | None = None
    grid: Grid | None = None
    num_prefix: int = 0
    sizes: Float[Tensor, "b n"] | None = None
    source: Int[Tensor, "b n0"] | None = None
    streams: dict[str, Tensor] = field(default_factory=dict)

    def with_x(self, x: Float[Tensor, "b n c"]) -> Tokens:
        """The same tokens with other features."""
        return replace(self, x=x)
