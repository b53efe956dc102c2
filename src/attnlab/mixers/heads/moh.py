"""Mixture-of-head attention: heads as experts, chosen per token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import DENSE, AttentionOptions, CachedAttention
from attnlab.mixers.heads.routers import LinearRouter, QueryNormRouter, balance_loss
from attnlab.mixers.parts.cosine import ScaledCosine
from attnlab.mixers.parts.counts import key_counts


@mixers.register(
    "moh", family="heads", paper="moh", supports=replace(DENSE, discontinuous=True), example={"num_shared": 1, "num_active": 2}
)
class MixtureOfHeads(CachedAttention):
    r"""Softmax attention whose head outputs are weighed per token by a router (Jin et al. 2024, equations 3 to 7).

    $$y_t = \sum_h g_h(x_t)\, o_{h,t} W_O^h$$

    Some heads are shared and always on; of the others a token uses ``num_active``. Gates multiply the head outputs of the
    query's token before the output projection, so keys and values of all heads are formed. Time and memory are those of
    softmax attention. ``record`` collects "gates" (b, n, h), "router" (scores of the routed heads, b n r) and "balance_loss"
    (a scalar to be added to the loss; the authors use 0.01 of its mean over layers).

    Args:
        dim: width of the tokens.
        num_heads: all heads.
        num_shared: heads that are always on, the first ones; by default a quarter.
        num_active: routed heads a token uses; by default half of the routed ones.
        router: "linear" (models trained from scratch) or "query_norm" (parameter-free, binary, for pre-trained models).
        score: "dot" (scaled dot product) or "cosine" (the length-scaled cosine of the authors' vision models).
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
        num_shared = num_heads // 4 if num_shared is None else num_shared
        if not 0 <= num_shared <= num_heads:
            raise ValueError(f"num_shared: expected 0 to num_heads={num_heads}, got {num_shared}")
        routed = num_heads - num_shared
        num_active = (routed + 1) // 2 if num_active is None else num_active
        if not min(routed, 1) <= num_active <= routed:
            raise ValueError(f"num_active: expected {min(routed, 1)} to {routed} (num_heads - num_shared), got {num_active}")
        if router not in ("linear", "query_norm"):
            raise ValueError(f"router: expected 'linear' or 'query_norm', got {router!r}")
        if score not in ("dot", "cosine"):
            raise ValueError(f"score: expected 'dot' or 'cosine', got {score!r}")
        self.chooses = num_active < routed
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.linear_router = LinearRouter(dim, num_heads, num_shared, num_active, **place) if router == "linear" else None
        self.norm_router = QueryNormRouter(num_shared, num_active) if router == "query_norm" else None
        self.cosine = ScaledCosine(num_heads, self.head_dim, **place) if score == "cosine" else None

    @property
    def supports(self) -> Supports:
        """With all routed heads active there is no choice."""
        return self.info.supports if getattr(self, "chooses", True) else DENSE

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

    def weigh_heads(
        self, heads: Float[Tensor, "b h n e"], x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b h n e"]:
        """Head outputs times the gates of their tokens."""
        if self.linear_router is not None:
            gates, scores, chosen = self.linear_router(x)
        else:
            q = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2))
            gates, scores, chosen = self.norm_router(q)  # type: ignore[misc]
        self.emit("gates", gates)
        if scores is not None:
            self.emit("router", scores)
            self.emit("balance_loss", lambda: balance_loss(scores, chosen, mask))
        return heads * gates.transpose(1, 2).unsqueeze(-1).to(heads.dtype)
