"""Chunk-causal attention: tokens of a chunk see all of it and of the chunks before."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer, AttentionOptions


@mixers.register(
    "chunk_causal",
    family="partitioned",
    paper="fit",
    partial=True,
    supports=Supports(mixing_matrix=True, cost=2.0),
    example={"chunk": 3},
)
class ChunkCausalAttention(AttentionMixer):
    r"""Softmax attention that is causal by chunks (Chen and Li 2023, FIT, section 2.2: its global latents).

    $$o_i = \sum_{j:\, \lfloor j / m \rfloor \le \lfloor i / m \rfloor} \mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j)\, v_j$$

    Inside a chunk of m tokens it looks ahead, so this is not what ``causal=True`` promises; a chunk of one is causal attention,
    and one as long as the sequence dense attention. Chunks are counted from the
    first real token on. Time O(n^2 d), memory O(n^2) for the mask.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        chunk: m.
        **options: those of `AttentionMixer`.

    Raises:
        ValueError: for a chunk below 1.
        UnsupportedError: with ``causal=True``.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, chunk: int = 16, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        if chunk < 1:
            raise ValueError(f"chunk: expected at least 1, got {chunk}")
        self.chunk = chunk

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over one's own chunk and those before."""
        place = torch.arange(q.shape[2], device=q.device)[None]
        if masks.key is not None:
            place = place - torch.where(masks.key, place, q.shape[2]).amin(1, keepdim=True)
        chunk = place.div(self.chunk, rounding_mode="floor")
        allowed = (chunk[:, :, None] >= chunk[:, None]).unsqueeze(1)
        return self.dense(q, k, v, masks._replace(pair=allowed), grid)
