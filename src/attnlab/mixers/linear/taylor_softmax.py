"""Softmax attention with the exponential cut off after its second order, in linear time."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.linear.core import real_only, with_ones
from attnlab.mixers.linear.quotient import LINEAR, QuotientAttention
from attnlab.ops.attention import attention
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import full_precision
from attnlab.ops.taylor_attention import features, taylor_attention

_BY_PAIRS = 2  # up to so many keys a feature the n x n weights, in blocks, take less time than the features


@mixers.register("taylor_softmax", family="linear", paper="deconstructing-attention", supports=replace(LINEAR, pair_mask=True))
class TaylorSoftmaxAttention(QuotientAttention):
    r"""Attention with the second-order Taylor form of softmax ("approximate" of Xue et al. 2025, Deconstructing Attention).

    $$o_i = \frac{\sum_j w_{ij} v_j}{\sum_j w_{ij}}, \qquad w_{ij} = 1 + s_{ij} + \tfrac12 s_{ij}^2, \quad
      s_{ij} = d^{-1/2}\, q_i^\top k_j ,$$

    over all j, or over j <= i where causal. As $w = \tfrac12 ((s + 1)^2 + 1) \ge \tfrac12$, no denominator vanishes, whatever
    the position turns. It is linear attention with the features

    $$\phi(x) = \Big[1,\; \frac{x}{d^{1/4}},\; \Big(\frac{x_a x_b}{\sqrt{d}}\, c_{ab}\Big)_{a \le b}\Big], \qquad
      c_{aa} = \tfrac{1}{\sqrt2}, \; c_{ab} = 1 ,$$

    each product once: D = 1 + d + d (d + 1) / 2 of them, formed for a piece of the sequence at a time (`ops.taylor_attention`).
    Time O(n D d), memory O(n d), where causal n D d / 256 for the gradient. It takes less time than the n x n weights from about
    n = 2 D on, 1100 tokens for d = 32; below, and with a pair mask, those are formed in blocks: time O(n^2 d), memory O(n).
    Streaming is by features. State: ``sum`` (b, h, D, d + 1), and ``position`` (b,) if there is one.

    Args: those of `AttentionMixer`; ``num_kv_heads`` must be all, ``position`` one in queries and keys such as "rotary".

    Raises:
        ValueError: for grouped keys, or a position that acts on logits, weights or values.

    Differs from the paper: positions are a slot, "none" by default; the authors use "rotary". Of the paper's other variants "mlp"
    mixes no tokens: it is the channel mixer "swiglu", 4 dim / 3 wide for as many parameters.
    """

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """By pairs where that is faster, or there is a choice of pairs; by features otherwise."""
        if masks.pair is None and k.shape[2] > _BY_PAIRS * self.feature_width:
            return super().attend(q, k, v, masks, grid)
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        sums = attention(q, k, v, causal=self.causal, key_mask=masks.key, pair_mask=masks.pair, normalizer="taylor_exp")
        return self.divide(sums)

    @property
    def feature_width(self) -> int:
        """1 + d + d (d + 1) / 2."""
        return 1 + self.head_dim + self.head_dim * (self.head_dim + 1) // 2

    def features(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n w"]:
        """One, the channels, and their products."""
        return features(x)

    @full_precision
    def read(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m e"],
        masks: Masks,
        grid: Grid | None,
        index: Int[Tensor, "#b n"] | None,
        initial: Float[Tensor, "b h w1 e1"] | None = None,
    ) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h w1 e1"]]:
        """The features in pieces."""
        dtype, wide = v.dtype, accumulate_dtype(v.dtype)
        k, v = real_only(k.to(wide), masks.key), with_ones(v.to(wide), masks.key)
        sums, after = taylor_attention(q.to(wide), k, v, initial_state=initial, causal=self.causal)
        return self.divide(sums).to(dtype), after
