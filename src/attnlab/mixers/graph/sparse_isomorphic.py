"""Sparse GIN adapter: attention, and a GIN layer on the tokens over the sharpened mean of its maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.graph.adapter import GraphAdapter
from attnlab.mixers.graph.adjacency import Shaping
from attnlab.mixers.graph.head_mlp import HeadMLP


@mixers.register(
    "sparse_isomorphic",
    family="graph",
    paper="graph-aware-attention",
    supports=Supports(
        causal="optional",
        pair_mask=True,
        grid=frozenset({1, 2, 3}),
        mixing_matrix=True,
        permutation_equivariant=True,
        cost=2.0,
    ),
)
class SparseIsomorphicAdapter(GraphAdapter):
    r"""Attention with a sparse GIN beside it (Buehler 2025, Sparse GIN-Attention).

    With the maps $A_h$ of softmax attention, $\hat A$ their mean over heads, shaped, and a learned scale s,

    $$y = W_o [A_h V_h]_h + s\,\big(W_2\, \mathrm{SiLU}(\mathrm{RMSNorm}(W_1 Z + b_1)) + b_2\big), \qquad
      Z = \epsilon X + \hat A X$$

    It is for fine-tuning: `freeze_attention` leaves s, $\epsilon$ and the perceptron to be trained. Time
    O(n^2 C), memory O(n^2) a head.

    Args:
        dim: width of the tokens.
        num_heads: heads of the attention.
        expansion: inner width of the perceptron, relative to ``dim``.
        epsilon: $\epsilon$ at first, which is learned.
        scale: s at first.
        adjacency: how the mean map is shaped, see `Shaping`.
        threshold: of the adjacency.
        sharpness: of the adjacency.
        fraction: of the adjacency.
        **options: those of `AttentionMixer`.

    Raises:
        ValueError: for an expansion below 1, and what `GraphAdapter` and `Shaping` refuse.

    Differs from the paper: it is built from a description; the maps are averaged over heads, and the update is part of the
    mixer's output. It equals no recorded vectors.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        expansion: int = 2,
        epsilon: float = 0.0,
        scale: float = 0.1,
        adjacency: str = "sharp_softplus",
        threshold: float = 0.2,
        sharpness: float = 10.0,
        fraction: float = 0.1,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if expansion < 1:
            raise ValueError(f"expansion: expected at least 1, got {expansion}")
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.shaping = Shaping(adjacency, threshold, sharpness, fraction)
        self.epsilon = nn.Parameter(torch.full((), epsilon, **place))
        self.scale = nn.Parameter(torch.full((), scale, **place))
        self.mlp = HeadMLP(1, dim, expansion * dim, dim, norm=True, **place)

    @property
    def supports(self) -> Supports:
        """With "binary" and "top_k" edges are or are not, and the output jumps between."""
        shaping = getattr(self, "shaping", None)
        return self.info.supports if shaping is None or not shaping.jumps else replace(self.info.supports, discontinuous=True)

    def update(
        self,
        x: Float[Tensor, "b n c"],
        y: Float[Tensor, "b n c"],
        graph: Float[Tensor, "b h n m"],
        q: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h m d"],
        masks: Masks,
    ) -> Float[Tensor, "b n c"]:
        """The GIN layer on the mean map; a pair is in it if any head allows it."""
        allowed = masks.allowed(q.shape[2], v.shape[2], causal=self.causal, device=q.device)
        if allowed is not None:
            allowed = allowed.any(dim=1, keepdim=True)
        adjacency = self.shaping(graph.mean(dim=1, keepdim=True), allowed)
        self.emit("adjacency", adjacency)
        return self.scale * self.mlp(self.epsilon * x.unsqueeze(1) + adjacency @ x.unsqueeze(1)).squeeze(1)
