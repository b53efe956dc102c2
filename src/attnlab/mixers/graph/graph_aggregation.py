"""Graph aggregation attention: each head sums, averages, maximises and spreads over the neighbours of its map."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.graph.adjacency_attention import AdjacencyAttention, ScoreOptions
from attnlab.mixers.graph.head_mlp import HeadMLP

_BLOCK = 1 << 22  # numbers in the messages that exist at once, of an example


@mixers.register(
    "graph_aggregation",
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
class GraphAggregationAttention(AdjacencyAttention):
    r"""PNA attention: principal neighbourhood aggregation on attention maps (Buehler 2025, Graph-Aware Isomorphic Attention).

    Over the pairs N(i) that masks and causality allow, with the adjacency $\hat A_h$ of `AdjacencyAttention`, messages
    $m_{ij} = \hat A_{ij} v_j$ and $\bar m_i$ their mean,

    $$z_i = \Big[\sum_j m_{ij},\ \bar m_i,\ \max_j m_{ij},\ \operatorname{mean}_j (m_{ij} - \bar m_i)^2\Big], \qquad
      o_i = W_2\, \mathrm{SiLU}(W_1 z_i + b_1) + b_2$$

    with a perceptron a head, whose outputs are concatenated and projected. The mixing matrix is $\hat A_h$: it multiplies the
    values in all four, and "mixed" is their sum. By definition a message is formed for each pair: time O(n^2 C), memory O(n^2)
    a head, for messages come in blocks.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        expansion: inner width of a head's perceptron, relative to that of the head.
        normalizer: see `AdjacencyAttention`.
        adjacency: see `Shaping`; the authors use "softplus" or "relu".
        threshold: of the adjacency.
        **options: those of `AdjacencyAttention`.

    Raises:
        ValueError: for an expansion below 1, and what `AdjacencyAttention` refuses.

    Differs from the paper: it is built from a description that leaves open what the mean and the variance are taken over; here it
    is the allowed pairs, each with its weight in the message. It equals no recorded vectors.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        expansion: int = 2,
        normalizer: str = "identity",
        adjacency: str = "softplus",
        threshold: float = 0.0,
        **options: Unpack[ScoreOptions],
    ) -> None:
        super().__init__(dim, num_heads, normalizer=normalizer, adjacency=adjacency, threshold=threshold, **options)
        if expansion < 1:
            raise ValueError(f"expansion: expected at least 1, got {expansion}")
        width = self.head_dim
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.mlp = HeadMLP(num_heads, 4 * width, expansion * width, width, norm=False, **place)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Form the graph, aggregate in four ways, and project."""
        q, k, v = self.project(x, context, self.place(x, masks.query))
        graph = self.form_map(q, k, masks, grid)
        total = graph @ v
        self.show(q, k, v, total, masks, grid)
        heads = self.mlp(self._aggregate(q, graph, v, total, masks))
        return self.join(self._with_local(heads, v, grid, masks.key), x, masks.query)

    def _aggregate(
        self,
        q: Float[Tensor, "b h n d"],
        graph: Float[Tensor, "b h n m"],
        v: Float[Tensor, "b h m e"],
        total: Float[Tensor, "b h n e"],
        masks: Masks,
    ) -> Float[Tensor, "b h n e4"]:
        """Sum, mean, maximum and variance of the messages; 0 where there are none."""
        allowed = masks.allowed(q.shape[2], v.shape[2], causal=self.causal, device=q.device)
        if allowed is None:
            allowed = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=v.device)
        allowed = allowed.expand(*allowed.shape[:2], graph.shape[2], graph.shape[3])
        count = allowed.sum(dim=-1, keepdim=True).clamp(min=1)
        mean = total / count
        rows = max(1, _BLOCK // (v.shape[1] * v.shape[2] * v.shape[3]))  # one example's messages of all heads
        pieces = []
        for place in range(0, graph.shape[2], rows):
            part = slice(place, place + rows)
            block = (graph[:, :, part], v, mean[:, :, part], allowed[:, :, part], count[:, :, part])
            if rows >= graph.shape[2] or not torch.is_grad_enabled():
                pieces.append(_extremes(*block))
            else:  # recomputed in the backward pass, so that no more than a block of messages exists at once
                pieces.append(checkpoint(_extremes, *block, use_reentrant=False, preserve_rng_state=False))
        return torch.cat((total, mean, torch.cat(pieces, dim=2)), dim=-1)


def _extremes(
    graph: Float[Tensor, "b h r m"],
    v: Float[Tensor, "b h m e"],
    mean: Float[Tensor, "b h r e"],
    allowed: Bool[Tensor, "#b #h r m"],
    count: Int[Tensor, "#b #h r 1"],
) -> Float[Tensor, "b h r e2"]:
    """Maximum and variance of the messages to some of the nodes."""
    outside = ~allowed.unsqueeze(-1)
    messages = graph.unsqueeze(-1) * v.unsqueeze(2)
    largest = messages.masked_fill(outside, float("-inf")).amax(dim=3)
    largest = largest.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)
    spread = (messages - mean.unsqueeze(3)).masked_fill(outside, 0.0).square().sum(dim=3) / count
    return torch.cat((largest, spread), dim=-1)
