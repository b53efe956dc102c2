"""Blocked local attention: a token sees its own block and the one before."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.mixers.attention import CachedAttention
from attnlab.mixers.parts.causal_options import CausalOptions
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention


@mixers.register(
    "block_span",
    family="local",
    paper="masformer",
    supports=Supports(causal="always", streaming=True, mixing_matrix=True, state="bounded", cost=1.0),
    example={"block": 4},
)
class BlockSpanAttention(CachedAttention):
    r"""Causal softmax attention inside blocks of b tokens and to the p blocks before (Zhang et al. 2023, MASFormer).

    $$o_i = \sum_{j = b \max(0, \lfloor i / b \rfloor - p)}^{i} \mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j)\, v_j$$

    The sparse layers of MASFormer, whose other layers are "softmax": see the schedule "full_at_bottom". Unlike a sliding window
    the span of a token ends where a block begins: p b + 1 to (p + 1) b keys. Time O(n p b d), memory O(n d); the state holds less
    than (p + 1) b keys and values.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        block: b.
        num_previous: p; 0 for blocks that see themselves alone.
        causal: always True.
        **options: those of `AttentionMixer`; ``position`` may be "none" or "rotary".

    Raises:
        ValueError: for a block below 1, fewer than 0 blocks before, or a position that is a bias.
        UnsupportedError: with ``causal=False``.

    Differs from the paper: it is built from the abstract and from memory of the paper; no code of its authors was found. Blocks
    are those of places, masked or not: pad on the right.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        block: int = 1024,
        num_previous: int = 1,
        causal: bool = True,
        **options: Unpack[CausalOptions],
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, **options)
        if block < 1:
            raise ValueError(f"block: expected at least 1, got {block}")
        if num_previous < 0:
            raise ValueError(f"num_previous: expected at least 0, got {num_previous}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}; blocks have no bias")
        self.block, self.num_previous = block, num_previous

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the span. The first key begins a block, the last query stands at the last key."""
        n, m, block, device = q.shape[2], k.shape[2], self.block, q.device
        first = m - n
        if n == 1:
            keys = torch.arange(self._start(first), m, device=device)
            queries = keys.new_zeros(1, 1)
            found = tile_attention(q, k, v, queries[None, None], keys[None, None, None], key_mask=masks.key)
            return from_tiles(found.output, queries[0])
        tiles = torch.arange(first // block, (m - 1) // block + 1, device=device)[:, None] * block
        a = torch.arange(block, device=device)
        b = torch.arange(block * (self.num_previous + 1), device=device) - block * self.num_previous
        queries = (tiles + a - first).masked_fill((tiles + a < first) | (tiles + a >= m), -1)
        keys = (tiles + b).masked_fill((tiles + b < 0) | (tiles + b >= m), -1)
        bias = None
        if first:  # queries and keys are not counted from the same place, so that their order is not that of their numbers
            bias = q.new_zeros(len(a), len(b)).masked_fill(b > a[:, None], float("-inf"))[None, None]
        found = tile_attention(q, k, v, queries[None, None], keys[None, None], bias=bias, causal=not first, key_mask=masks.key)
        return from_tiles(found.output, places_of(queries, n))

    def trim(self, state: State) -> State:
        """The blocks that the next token sees, from the beginning of the first of them."""
        start = self._start(state["k"].shape[2])
        if not start:
            return state
        # Contiguous copies: a view would keep the whole history alive.
        kept = {"k": state["k"][:, :, start:].clone(), "v": state["v"][:, :, start:].clone()}
        return state.replace(**kept, real=state["real"][:, start:].clone())

    def _start(self, place: int) -> int:
        """The first key of the token at this place."""
        return max(0, place // self.block - self.num_previous) * self.block
