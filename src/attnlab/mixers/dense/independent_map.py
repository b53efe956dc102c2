"""Attention whose map comes from another stream than its values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import zero_masked
from attnlab.mixers.attention import DENSE, AttentionOptions, CachedAttention


@mixers.register("independent_map", family="dense", paper="deconstructing-attention", supports=replace(DENSE, cross=False))
class IndependentMapAttention(CachedAttention):
    r"""Softmax attention with queries and keys of a source s, and values of x (Xue et al. 2025, Deconstructing Attention).

    $$o_i = \sum_j \mathrm{softmax}_j\big(d^{-1/2}\, (W_Q s_i)^\top W_K s_j + b_{ij}\big)\, W_V x_j$$

    over all j, or over j <= i where causal. The source has a token for each of x. It is given for a call by `mix_from`, or for
    what runs inside `reading`; without one it is x, and this is "softmax". Which stream it is, embeddings of the same tokens or
    a fixed sequence that runs through the layers below, is the model's to say: `attnlab.models.independent_maps`. Time O(n m d),
    memory O(n + m).

    Args: those of `AttentionMixer`.

    Raises:
        ValueError: for a source of another shape than x.

    Differs from the paper: positions are a slot, "none" by default; the authors use "rotary".
    """

    def __init__(self, dim: int, num_heads: int = 8, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        self._source: Tensor | None = None

    @contextmanager
    def reading(self, source: Float[Tensor, "s m c2"]) -> Iterator[None]:
        """Take queries and keys from ``source`` (batch or 1, n, dim) inside the block, in `forward` and `extend` alike."""
        before, self._source = self._source, source
        try:
            yield
        finally:
            self._source = before

    def mix_from(
        self,
        x: Float[Tensor, "b n c"],
        source: Float[Tensor, "s m c2"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        pair_mask: Bool[Tensor, "#b #h n m"] | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "b n c"]:
        """`forward` with the map of ``source`` (batch or 1, n, dim), whose masked tokens are those of x."""
        with self.reading(zero_masked(_like(source, x), mask)):
            return self(x, mask=mask, pair_mask=pair_mask, grid=grid)

    def project(
        self, x: Float[Tensor, "b n c"], context: Tensor | None = None, index: Int[Tensor, "#b n"] | None = None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b hk m d"], Float[Tensor, "b hk m d"]]:
        """Queries and keys of the source, values of x."""
        if self._source is None:
            return super().project(x, context, index)
        q, k, _ = super().project(_like(self._source, x), context, index)
        return q, k, rearrange(self.v_proj(x), "b m (h d) -> b h m d", h=self.num_kv_heads)


def _like(source: Tensor, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
    """The source for every example; ValueError where it has another shape than ``x``."""
    if source.shape[1:] != x.shape[1:] or source.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"source: expected shape {tuple(x.shape)}, or batch size 1, got {tuple(source.shape)}")
    return source.expand_as(x)
