"""Aaren: softmax attention with a learned query for all tokens, which makes it a recurrent network."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.parts.prefix_attention import PREFIX, PrefixAttention


@mixers.register("aaren", family="recurrent", paper="aaren", supports=PREFIX)
class Aaren(PrefixAttention):
    r"""Attention as a recurrent neural network (Feng et al. 2024, sections 3.2 and 3.3).

    With a learned query token $q^{(0)}$ of width dim in place of each token's own, for each head

    $$s_j = d^{-1/2} (W_Q q^{(0)})^\top W_K x_j, \qquad o_t = \frac{\sum_{j \le t} e^{s_j} W_V x_j}{\sum_{j \le t} e^{s_j}} ,$$

    all prefixes at once by `attnlab.ops.prefix_softmax`, a token at a time from a state of constant size: ``mean`` (b, h, d) and
    ``lse`` (b, h), in float32 or wider, which stand for the paper's $a / c$ and $m + \ln c$. Time and memory O(n d). Without
    causality all tokens get the mean over all.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        **options: those of `AttentionMixer`; ``num_kv_heads`` must be all and ``position`` "none".

    Raises:
        ValueError: for grouped keys, or a position: the paper adds it to the embeddings.

    Differs from the paper: a form that is not causal, pair masks, and no biases in the projections unless asked for
    (``qkv_bias=True``: with these, a layer has dim parameters more than one of a Transformer, the query token, as the paper
    counts). There is no official code; the mechanism is held against masked softmax attention.
    """

    def __init__(self, dim: int, num_heads: int = 8, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        self.query = nn.Parameter(torch.empty(dim, device=options.get("device"), dtype=options.get("dtype")).normal_())

    def project(
        self, x: Float[Tensor, "b n c"], context: Tensor | None = None, index: Int[Tensor, "#b n"] | None = None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
        """The learned query for every token, keys and values."""
        q = self.q_norm(rearrange(self.q_proj(self.query), "(h d) -> h 1 d", h=self.num_heads))
        k = self.k_norm(rearrange(self.k_proj(x), "b n (h d) -> b h n d", h=self.num_heads))
        v = rearrange(self.v_proj(x), "b n (h d) -> b h n d", h=self.num_heads)
        return q.expand_as(k), k, v
