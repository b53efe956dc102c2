"""Sigmoid attention: an element-wise sigmoid in place of the row's softmax."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.attention import DENSE, AttentionOptions, CachedAttention
from attnlab.mixers.parts.counts import key_counts


@mixers.register("sigmoid", family="dense", paper="sigmoid-attention", supports=DENSE)
class SigmoidAttention(CachedAttention):
    r"""Attention whose weights do not compete (Ramapuram et al. 2024, equation 3).

    $$o_i = \sum_j \sigma\!\left(e^{\tau}\,(d^{-1/2}\, q_i^\top k_j + b_{ij}) + \beta_i\right) v_j$$

    Rows do not sum to one; $\beta = -\ln n$ keeps the output's norm at initialisation independent of n. Time O(n m d),
    memory O(n + m): blocks of queries, recomputed in the backward pass.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        logit_bias: $\beta$. "log_count": minus the log of the number of keys that the query may use; a number: the same for all
            (the authors use $-\ln$ of the training length, or about -10).
        log_temperature: $\tau$, 0 for none.
        **options: those of `AttentionMixer`.

    Raises:
        ValueError: for a ``logit_bias`` that is neither.

    Differs from the paper: with ``causal=True`` and "log_count" the count is that of each row, not the sequence's length, so
    that an output does not depend on how many tokens follow and streaming is exact; pass ``logit_bias=-math.log(n)`` for the
    authors' constant.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        logit_bias: str | float = "log_count",
        log_temperature: float = 0.0,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if isinstance(logit_bias, str) and logit_bias != "log_count":
            raise ValueError(f"logit_bias: expected 'log_count' or a number, got {logit_bias!r}")
        self.logit_bias, self.log_temperature = logit_bias, log_temperature

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Sigmoid weights over the allowed keys."""
        heat = math.exp(self.log_temperature)
        if isinstance(self.logit_bias, str):
            shift = -key_counts(q, k.shape[2], causal=self.causal, key_mask=masks.key, pair_mask=masks.pair).log()
        else:
            shift = q.new_full((1, 1, 1, 1), self.logit_bias)
        return self.dense(q, k, v, masks, grid, scale=heat * self.head_dim**-0.5, bias=shift, heat=heat, normalizer="sigmoid")
