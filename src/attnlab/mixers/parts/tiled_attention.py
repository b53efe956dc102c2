"""Softmax attention inside tiles of a grid that do not depend on the input: windows, stripes, lattices."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer
from attnlab.ops.attention import Pairwise
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention

BORDERS = ("zero_keys", "masked")
"""What cells beyond a grid may be among the keys of a tile: see `zero_keys`, or none at all."""


class TiledAttention(AttentionMixer):
    """Queries of a tile attend to the keys of the same tile; subclasses name both.

    A subclass implements `tiles`, and `term` where pairs of a tile have a bias. Every token is a query in one tile.
    """

    outside: str = "masked"
    """What a tile's places beyond the grid are among the keys: "masked", or "zero", keys and values of zeros."""

    def tiles(self, grid: Grid) -> tuple[Int[Tensor, "t x"], Int[Tensor, "t y"]]:
        """The cells of each tile's queries and keys; -1 for none."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement tiles")

    def term(self, q: Float[Tensor, "b h n d"], grid: Grid) -> tuple[Float[Tensor, "#h kinds x y"] | None, Tensor | None]:
        """A bias for each kind of tile, and the kind of each tile (None if there is one kind)."""
        return None, None

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax inside each tile."""
        grid = grid or (q.shape[2],)
        queries, keys = (index.to(q.device) for index in self.tiles(grid))
        bias, kind = self.term(q, grid)
        found = tile_attention(
            q,
            k,
            v,
            queries[None, None],
            keys[None, None],
            bias=bias,
            kind=kind,
            causal=self.causal,
            key_mask=masks.key,
            outside=self.outside,
        )
        return from_tiles(found.output, places_of(queries, q.shape[2]))

    def inside(self, q: Float[Tensor, "b h n d"], sides: Grid) -> Float[Tensor, "#h 1 x x"] | None:
        """This mixer's position as a bias of the pairs of one box; None without.

        Raises:
            ValueError: for a position that depends on the queries, or acts elsewhere than on logits.
        """
        count = math.prod(sides)
        like = q.new_zeros(1, q.shape[1], count, q.shape[3])
        term = Pairwise.of(self.position.bias(like, count, causal=False, grid=sides))
        if term.keys is not None or self.position.factor(like, count, causal=False, grid=sides) is not None:
            raise ValueError(f"position: expected a bias of pairs alone, got {self.position_name!r}")
        bias = term.expanded(like, count, 1.0)
        return None if bias is None else torch.broadcast_to(bias, (1, *bias.shape[1:2], count, count))[0].unsqueeze(1)


def zero_keys(
    k: Float[Tensor, "b hk m d"], v: Float[Tensor, "b hk m e"], key_mask: Bool[Tensor, "b m"] | None
) -> tuple[Float[Tensor, "b hk m d"], Float[Tensor, "b hk m e"]]:
    """Keys and values of zeros at masked tokens: what cells beyond the grid are where these take part in the softmax.

    Padding is then more of what lies beyond the border, and a padded sequence gives what it gives alone.
    """
    if key_mask is None:
        return k, v
    masked = ~key_mask[:, None, :, None]
    return k.masked_fill(masked, 0.0), v.masked_fill(masked, 0.0)
