"""Sliding-window attention with optional sink tokens."""

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
from attnlab.mixers.attention import AttentionOptions, CachedAttention
from attnlab.ops.sliding_window import sliding_window_attention


@mixers.register(
    "sliding_window",
    family="local",
    supports=Supports(
        causal="optional",
        streaming=True,
        grid=frozenset({1}),
        mixing_matrix=True,
        state="bounded",
        associative=True,
        cost=1.0,
    ),
    example={"window": 4, "num_sinks": 2},
)
class SlidingWindowAttention(CachedAttention):
    r"""Softmax attention over the nearest keys and the first ones (Beltagy et al. 2020; sinks: Xiao et al. 2023).

    $$o_i = \sum_{j \in N(i)} \mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j)\, v_j$$

    Causal: $N(i) = \{i-w+1, \dots, i\} \cup \{0, \dots, s-1\}$, nothing beyond i; otherwise $N(i)$ is $w/2$ tokens on each
    side, i, and the sinks. Time O(n w d), memory O(n d). The state holds at most s + w - 1 keys and values.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        window: w, keys a query sees (causal), or twice the reach on each side.
        num_sinks: s, leading tokens that every later query sees.
        **options: those of `AttentionMixer`; ``position`` may be "none" or "rotary".

    Raises:
        ValueError: for a window below 1, a negative number of sinks, or a position that is a bias.

    Differs from the papers: sinks keep the positions they had in the text; they are not re-numbered inside the cache.
    Sinks are the first s places, real or not: with sinks, pad on the right.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        window: int = 256,
        num_sinks: int = 0,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        if num_sinks < 0:
            raise ValueError(f"num_sinks: expected at least 0, got {num_sinks}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(
                f"position: expected 'none' or 'rotary', got {self.position_name!r}; a bias has no place in the window"
            )
        self.window, self.num_sinks = window, num_sinks
        self.left = window - 1 if self.causal else window // 2
        self.right = 0 if self.causal else window // 2

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the window and the sinks."""
        return sliding_window_attention(q, k, v, left=self.left, right=self.right, num_sinks=self.num_sinks, key_mask=masks.key)

    def trim(self, state: State) -> State:
        """The sinks and the last w - 1 tokens: all that later queries can reach."""
        kept = {"k": self._recent(state["k"], 2), "v": self._recent(state["v"], 2)}
        return state.replace(**kept, real=self._recent(state["real"], 1)) if state["real"].shape[1] else state.replace(**kept)

    def _recent(self, tensor: Tensor, dim: int) -> Tensor:
        length, keep = tensor.shape[dim], self.num_sinks + self.left
        if length <= keep:
            return tensor
        # Contiguous copies: a view would keep the whole history alive.
        sinks, recent = tensor.narrow(dim, 0, self.num_sinks), tensor.narrow(dim, length - self.left, self.left)
        return torch.cat((sinks, recent), dim=dim)
