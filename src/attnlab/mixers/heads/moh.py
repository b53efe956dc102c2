"""Mixture-of-head attention: heads as experts, chosen per token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.attention import DENSE, AttentionMixer, AttentionOptions, CachedAttention
from attnlab.mixers.heads.grouping import to_grouped
from attnlab.mixers.heads.routed_heads import RoutedHeads
from attnlab.mixers.parts.cosine import ScaledCosine
from attnlab.mixers.parts.counts import key_counts


@mixers.register(
    "moh", family="heads", paper="moh", supports=replace(DENSE, discontinuous=True), example={"num_shared": 1, "num_active": 2}
)
class MixtureOfHeads(RoutedHeads, CachedAttention):
    r"""Softmax attention whose head outputs are weighed per token by a router (Jin et al. 2024, equations 3 to 7).

    $$y_t = \sum_h g_h(x_t)\, o_{h,t} W_O^h$$

    Some heads are shared and always on; of the others a token uses ``num_active``. Gates multiply the head outputs of the
    query's token before the output projection, so keys and values of all heads are formed. Time and memory are those of
    softmax attention. ``record`` collects "gates" (b, n, h), "router" (scores of the routed heads, b n r) and "balance_loss"
    (a scalar to be added to the loss; the authors use 0.01 of its mean over layers).

    Args:
        dim: width of the tokens.
        num_heads: all heads.
        num_shared: heads that are always on, the first ones; by default a quarter, with "query_norm" half.
        num_active: routed heads a token uses; by default half of the routed ones, 0 if all heads are shared.
        router: "linear" (models trained from scratch) or "query_norm" (parameter-free, binary, for pre-trained models: see
            `to_mixture_of_heads`; by default 75 % of the heads are on, as the authors' language model has it).
        score: "dot" (scaled dot product) or "cosine" (the length-scaled cosine of the authors' vision models, whose lower
            stages are `moh_aggregated`).
        **options: those of `AttentionMixer`.

    Raises:
        ValueError: for counts that do not fit, or an unknown router or score.

    Differs from the paper: the balance loss counts real tokens alone; causal and streaming forms are exact.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_shared: int | None = None,
        num_active: int | None = None,
        router: str = "linear",
        score: str = "dot",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if score not in ("dot", "cosine"):
            raise ValueError(f"score: expected 'dot' or 'cosine', got {score!r}")
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.add_router(router, num_shared, num_active, **place)
        self.cosine = ScaledCosine(num_heads, self.head_dim, **place) if score == "cosine" else None

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax over the allowed keys, all heads."""
        if self.cosine is None:
            return self.dense(q, k, v, masks, grid)
        counts = key_counts(q, k.shape[2], causal=self.causal, key_mask=masks.key, pair_mask=masks.pair)
        q, k = self.cosine(q, k, counts)
        return self.dense(q, k, v, masks, grid, scale=1.0)


def to_mixture_of_heads(mixer: AttentionMixer, *, num_shared: int | None = None, num_active: int | None = None) -> MixtureOfHeads:
    """A trained softmax attention with the parameter-free router on its heads, to be tuned on (Jin et al. 2024, language models).

    The parameters are copied under the same names; with ``num_active`` all of the routed heads it computes the same.

    Args:
        mixer: a `SoftmaxAttention`.
        num_shared: heads that stay always on, the first ones; by default half.
        num_active: routed heads a token uses; by default half of the routed ones.

    Raises:
        ValueError: for another mechanism or normaliser, or counts that do not fit.
    """
    normalizer = getattr(mixer, "normalizer", None)
    if mixer.info.name != "softmax" or normalizer != "softmax":
        raise ValueError(f"mixer: expected 'softmax' with normalizer='softmax', got {mixer.info.name!r} with {normalizer!r}")
    routing: dict[str, Any] = {"router": "query_norm", "num_shared": num_shared, "num_active": num_active}
    # Groups of one head: their mean is the head.
    return cast("MixtureOfHeads", to_grouped(mixer, mixer.num_kv_heads, into="moh", **routing))
