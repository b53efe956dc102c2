"""Attention whose scores are the keys' own: softmax over a running sum, the same for every query."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from attnlab.core.catalog import mixers
from attnlab.mixers.parts.prefix_attention import PREFIX, PrefixAttention


@mixers.register("key_score", family="linear", paper="deconstructing-attention", supports=PREFIX)
class KeyScoreAttention(PrefixAttention):
    r"""Attention without queries ("non-approximate" of Xue et al. 2025, Deconstructing Attention).

    $$s_j = d^{-1/2} \sum_c \mathrm{SiLU}(W_Q x_j)_c\, (W_K x_j)_c, \qquad
      o_i = \frac{\sum_{j \le i} e^{s_j} v_j}{\sum_{j \le i} e^{s_j}}$$

    for each head; without causality all j count, and all tokens get the same. Time O(n d), memory O(n d), by
    `attnlab.ops.prefix_softmax`; with a pair mask time is O(n^2 d). State: ``mean`` (b, h, d) and ``lse`` (b, h), in float32 or
    wider.

    Args: those of `AttentionMixer`; ``num_kv_heads`` must be all and ``position`` "none".

    Raises:
        ValueError: for grouped keys, or a position, which scores of one token cannot have.

    Differs from the paper: a form that is not causal, and masks.
    """

    def score(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n"]:
        """Each key by the query of its own token."""
        return super().score(F.silu(q), k)
