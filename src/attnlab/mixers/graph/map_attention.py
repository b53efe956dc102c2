"""Attention that forms its map, because it computes with the map itself."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer, AttentionOptions


class MapAttention(AttentionMixer):
    """Attention by a map that a subclass forms as `form_map`; the mixing matrix is that. Memory O(n m) a head.

    Args:
        dim: width of the tokens.
        num_heads: heads, of keys and values too.
        **options: those of `AttentionMixer`.

    Raises:
        ValueError: for grouped heads.
    """

    def __init__(self, dim: int, num_heads: int = 8, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        if self.num_kv_heads != num_heads:
            raise ValueError(f"num_kv_heads: expected {num_heads} (num_heads): every head has its graph, got {self.num_kv_heads}")

    def form_map(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], masks: Masks, grid: Grid | None
    ) -> Float[Tensor, "b h n m"]:
        """The map, 0 at pairs that are not allowed."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: implement form_map")

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """The map times the values."""
        return self.form_map(q, k, masks, grid) @ v

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The map."""
        q, k, _ = self.project(x, context, self.place(x, masks.query))
        return self.form_map(q, k, masks, grid)

    def show(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        heads: Float[Tensor, "b h n e"],
        masks: Masks,
        grid: Grid | None,
    ) -> None:
        """Emit "values", "mixed" and, if anyone wants it, the map, "attention"."""
        self.emit("values", v)
        self.emit("mixed", heads)
        self.emit("attention", lambda: self.form_map(q, k, masks, grid))
