"""Scaled cosine attention: softmax over cosines, as hot as there are keys."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.attention import DENSE, AttentionOptions, CachedAttention
from attnlab.mixers.parts.cosine import ScaledCosine
from attnlab.mixers.parts.counts import key_counts


@mixers.register("scaled_cosine", family="dense", paper="transnext", supports=DENSE)
class ScaledCosineAttention(CachedAttention):
    r"""Softmax attention over length-scaled cosines (Shi 2023, TransNeXt, section 3.2): the attention of its last stage.

    $$o_i = \sum_j \mathrm{softmax}_j\!\left(\Big(\frac{q_i}{\lVert q_i\rVert} + e\Big)^{\!\top} \frac{k_j}{\lVert k_j\rVert}\;
      \mathrm{softplus}(t) \ln n_i + b_{ij}\right) v_j$$

    with an embedding $e$ and a temperature $t$ a head, $n_i$ the number of keys that query i may use, and the bias of the
    position; the authors' is "log_cpb". The logarithm is there to keep the entropy of a row where the number of keys changes.
    Time O(n m d), memory O(n + m). The state holds all keys and values.

    Args:
        dim: width of the tokens.
        num_heads: query heads.
        length_scale: whether there is $\ln n_i$.
        query_embedding: whether there is $e$.
        **options: those of `AttentionMixer`.

    Differs from the paper: also causal, where $n_i$ grows along the sequence, streamed, and across sequences; a query with one
    key has logit 0 before the bias, since $\ln 1 = 0$.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        length_scale: bool = True,
        query_embedding: bool = True,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.cosine = ScaledCosine(num_heads, self.head_dim, query_embedding=query_embedding, length_scale=length_scale, **place)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the allowed keys."""
        counts = key_counts(q, k.shape[2], causal=self.causal, key_mask=masks.key, pair_mask=masks.pair)
        q, k = self.cosine(q, k, counts)
        return self.dense(q, k, v, masks, grid, scale=1.0)
