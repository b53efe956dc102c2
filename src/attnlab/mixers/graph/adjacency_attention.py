"""What attention as a graph network shares: from tokens to the adjacency of each head."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.graph.adjacency import Shaping
from attnlab.mixers.graph.map_attention import MapAttention
from attnlab.ops.attention import attention_map


class ScoreOptions(AttentionOptions, total=False):
    """Those of `AdjacencyOptions` for which subclasses have no defaults of their own."""

    score: str
    score_hidden: int
    temperature: float
    sharpening: float | None
    differential: bool
    layer: int
    sharpness: float
    fraction: float


class AdjacencyOptions(ScoreOptions, total=False):
    """The options of `AdjacencyAttention` that a subclass hands on unchanged."""

    normalizer: str
    adjacency: str
    threshold: float


class AdjacencyAttention(MapAttention):
    r"""Attention whose map, shaped, is the adjacency of a graph for each head: $\hat A = f(A)$.

    $A = \mathrm{normalizer}(\alpha s_{ij} / T)$ with scores $s_{ij} = d^{-1/2} q_i^\top k_j$, or
    $s_{ij} = W_2\,\mathrm{SiLU}(W_1 [x_i; x_j])$; the differential form is $A^{(1)} - \lambda A^{(2)}$ of two pairs of queries
    and keys. The map is formed: memory O(n^2) a head, times ``score_hidden`` for scores by a perceptron.

    Args:
        dim: width of the tokens.
        num_heads: heads, of keys and values too.
        score: "dot" or "mlp".
        score_hidden: inner width of "mlp", a multiple of ``num_heads``.
        normalizer: "softmax", or "identity" for raw scores.
        temperature: T.
        sharpening: $\alpha$ at first, which is learned; None for 1, not learned.
        differential: subtract a second map.
        layer: l, from 0: $\lambda$, which is learned, is $0.8 - 0.6\, e^{-0.3\, l}$ at first.
        adjacency: f, see `Shaping`.
        threshold: of f.
        sharpness: of f.
        fraction: of f.
        **options: those of `AttentionMixer`.

    Raises:
        ValueError: for an unknown score or normaliser, numbers out of range, grouped heads, or the score "mlp" with a
            differential map, a position or a ``qk_norm``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        score: str = "dot",
        score_hidden: int = 512,
        normalizer: str = "softmax",
        temperature: float = 1.0,
        sharpening: float | None = None,
        differential: bool = False,
        layer: int = 0,
        adjacency: str = "none",
        threshold: float = 0.2,
        sharpness: float = 10.0,
        fraction: float = 0.1,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        for name, value, known in (("score", score, ("dot", "mlp")), ("normalizer", normalizer, ("softmax", "identity"))):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        if temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        if layer < 0:
            raise ValueError(f"layer: expected at least 0, got {layer}")
        self.normalizer, self.temperature = normalizer, temperature
        self.shaping = Shaping(adjacency, threshold, sharpness, fraction)
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.sharpening = None if sharpening is None else nn.Parameter(torch.full((), float(sharpening), **place))
        self.scorer = None
        self.q_proj_2 = self.k_proj_2 = self.difference = None
        self.difference_start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        if score == "mlp":
            if differential or self.position_name != "none" or options.get("qk_norm", "none") != "none":
                raise ValueError("score: expected 'dot' with differential=True, a position or a qk_norm, got 'mlp'")
            if score_hidden < 1 or score_hidden % num_heads:
                raise ValueError(f"score_hidden: expected a multiple of num_heads={num_heads}, got {score_hidden}")
            # The first layer's halves for x_i and x_j stand where queries and keys do, cut into heads only to be carried.
            self.q_proj = nn.Linear(dim, score_hidden, **place)
            self.k_proj = nn.Linear(dim, score_hidden, bias=False, **place)
            self.scorer = nn.Linear(score_hidden, num_heads, **place)
        if differential:
            bias = self.q_proj.bias is not None
            self.q_proj_2 = nn.Linear(dim, num_heads * self.head_dim, bias=bias, **place)
            self.k_proj_2 = nn.Linear(dim, num_heads * self.head_dim, bias=bias, **place)
            self.difference = nn.Parameter(torch.full((), self.difference_start, **place))

    def project(
        self, x: Float[Tensor, "b n c"], context: Tensor | None = None, index: Int[Tensor, "#b n"] | None = None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b hk m d"], Float[Tensor, "b hk m e"]]:
        """Queries and keys, both pairs side by side in the differential form, and values."""
        if self.scorer is not None:
            q, k, v = (rearrange(f(x), "b n (h d) -> b h n d", h=self.num_heads) for f in (self.q_proj, self.k_proj, self.v_proj))
            return q, k, v
        q, k, v = super().project(x, context, index)
        if self.q_proj_2 is None or self.k_proj_2 is None:
            return q, k, v
        index = torch.arange(x.shape[1], device=x.device)[None] if index is None else index
        second = [
            self.position.encode(norm(rearrange(layer(x), "b n (h d) -> b h n d", h=self.num_heads)), index)
            for norm, layer in ((self.q_norm, self.q_proj_2), (self.k_norm, self.k_proj_2))
        ]
        return torch.cat((q, second[0]), dim=-1), torch.cat((k, second[1]), dim=-1), v

    @property
    def supports(self) -> Supports:
        """With "binary" and "top_k" edges are or are not, and the output jumps between."""
        shaping = getattr(self, "shaping", None)
        return self.info.supports if shaping is None or not shaping.jumps else replace(self.info.supports, discontinuous=True)

    def form_map(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], masks: Masks, grid: Grid | None
    ) -> Float[Tensor, "b h n m"]:
        """The adjacency."""
        allowed = masks.allowed(q.shape[2], k.shape[2], causal=self.causal, device=q.device)
        slots: dict[str, Any] = {
            "causal": self.causal,
            "key_mask": masks.key,
            "pair_mask": masks.pair,
            "normalizer": self.normalizer,
        }
        heat = 1.0 / self.temperature if self.sharpening is None else self.sharpening / self.temperature
        if self.scorer is not None:
            rows, columns = (rearrange(t, "b h n d -> b n (h d)") for t in (q, k))
            scores = self.scorer(F.silu(rows.unsqueeze(2) + columns.unsqueeze(1))).movedim(-1, 1) * heat
            no_q, no_k = (t.new_zeros(*t.shape[:3], 1) for t in (q, k))  # the scores are the logits
            return self.shaping(attention_map(no_q, no_k, bias=scores, **slots), allowed)
        maps = []
        for q_part, k_part in zip(q.split(self.head_dim, dim=-1), k.split(self.head_dim, dim=-1), strict=True):
            bias = self.position.bias(q_part, k.shape[2], causal=self.causal, grid=grid)
            edit = self.position.factor(q_part, k.shape[2], causal=self.causal, grid=grid)
            maps.append(attention_map(q_part * heat, k_part, bias=bias, factor=edit, **slots))
        whole = maps[0] if self.difference is None else maps[0] - self.difference * maps[1]
        return self.shaping(whole, allowed)
