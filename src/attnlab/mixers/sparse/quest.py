"""Quest: each query reads the pages of keys whose bounds promise the largest products."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.mixers.attention import CachedAttention
from attnlab.mixers.parts.causal_options import CausalOptions
from attnlab.mixers.parts.selection import as_mask, sequence_blocks, tokens_of_blocks, top_k
from attnlab.mixers.sparse.frontier_rules import page_bounds, page_scores
from attnlab.ops.tile_attention import tile_attention
from attnlab.ops.tile_attention.routed import routed_attention


@mixers.register(
    "quest",
    family="sparse",
    paper="sparse-frontier",
    partial=True,
    supports=Supports(causal="always", streaming=True, mixing_matrix=True, discontinuous=True, state="grows", cost=2.0),
    example={"page": 2, "num_pages": 1},
)
class QuestAttention(CachedAttention):
    r"""Attention to the current page and the p pages with the largest bounds (Quest, as in Nawrot et al. 2025, 2504.17768).

    A page is b keys one behind the other. A complete page keeps the smallest and the largest of each element, and for query i

    $$u_{ir} = \sum_c \max\big(q_{ic} \min_{j \in r} k_{jc},\; q_{ic} \max_{j \in r} k_{jc}\big) \ge \max_{j \in r} q_i^\top k_j$$

    The query reads the p pages with the largest $u_{ir}$ among those before its own, and its own page up to itself, in one
    softmax. All keys are kept: what is saved is reading them. Prefill follows the rule of decoding too, so that a text said at
    once and token by token is the same. Time O(n (p b + n / b) d), memory O(n d + n^2 / b).

    ``record`` collects "selection" (b, h, n, t), True at the pages that a query reads.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        page: b.
        num_pages: p, beside the current one.
        share_pages: heads that share keys share pages: their bounds are added up.
        causal: always True.
        **options: those of `AttentionMixer`; ``position`` may be "none" or "rotary".

    Raises:
        ValueError: for sizes below 1, or a position that is a bias.
        UnsupportedError: with ``causal=False``.

    Differs from the paper: the first layers, which Quest leaves dense, are the model's affair. Masked tokens keep their places in
    pages (pad on the right) and are no keys.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        page: int = 16,
        num_pages: int = 16,
        share_pages: bool = False,
        causal: bool = True,
        **options: Unpack[CausalOptions],
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, **options)
        for name, value in (("page", page), ("num_pages", num_pages)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}; a bound knows no bias")
        self.page, self.num_pages, self.share_pages = page, num_pages, share_pages

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """A whole sequence: the queries of a page are gathered."""
        n = q.shape[2]
        chosen = self._choose(q, page_bounds(k.detach(), self.page, masks.key), 0)
        pages = sequence_blocks(n, self.page).to(q.device)
        own = torch.arange(n, device=q.device)[:, None] // self.page == torch.arange(len(pages), device=q.device)
        taken = as_mask(chosen, len(pages)) | own
        self.emit("selection", taken)
        return routed_attention(q, k, v, taken, pages, causal=True, key_mask=masks.key).output

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No keys, no pages."""
        empty = torch.zeros(batch_size, self.num_kv_heads, 0, self.head_dim, device=device, dtype=dtype)
        some = torch.ones(batch_size, 0, device=device, dtype=torch.bool)
        return super().begin(batch_size, device, dtype).replace(low=empty, high=empty.clone(), some=some)

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Bound the pages that the piece completes, choose, and read the chosen."""
        b, n = x.shape[:2]
        q, k, v = self.project(x, index=self._index(x, state, mask))
        first = state["k"].shape[2]
        state = state.grow(2, k=k, v=v)
        new = k.new_ones(b, n, dtype=torch.bool) if mask is None else mask
        state = state.replace(real=torch.cat((state["real"], new), 1), position=state["position"] + n)
        start = state["low"].shape[2] * self.page
        low, high, some = page_bounds(state["k"].detach()[:, :, start:], self.page, state["real"][:, start:])
        state = state.grow(2, low=low, high=high)
        state = state.replace(some=torch.cat((state["some"], some), 1))
        chosen = self._choose(q, (state["low"], state["high"], state["some"]), first)
        place = torch.arange(first, first + n, device=x.device)
        own = (place // self.page).view(1, 1, n, 1).expand(*chosen.shape[:3], 1)
        keys = tokens_of_blocks(torch.cat((chosen, own), -1), self.page, first + n)
        keys = keys.masked_fill(keys > place[:, None], -1)
        queries = torch.arange(n, device=x.device)[None, None, :, None]
        found = tile_attention(q, state["k"], state["v"], queries, keys, key_mask=state["real"])
        return self.join(found.output.squeeze(3), x, mask), state

    def _choose(self, q: Tensor, bounds: tuple[Tensor, Tensor, Tensor], first: int) -> Tensor:
        """The earlier pages of each query, (b, h, n, p), -1 for none; the first query stands at place ``first``."""
        low, high, some = bounds
        own = torch.arange(first, first + q.shape[2], device=q.device)[:, None] // self.page
        earlier = torch.arange(low.shape[2], device=q.device) < own
        scores = page_scores(q.detach(), low, high, share=self.share_pages)
        return top_k(scores, self.num_pages, (earlier & some[:, None, None]).expand_as(scores))
