"""p-adapter: attention, and a gated low-rank update from p-Laplacian message passing on its own map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.graph.adapter import GraphAdapter
from attnlab.mixers.graph.p_laplacian import p_laplacian
from attnlab.mixers.parts.segments import segment_means

GRAPHS = ("self", "bipartite")


class PLaplacianUpdate(nn.Module):
    r"""$W_{up}\big(\mathrm{GELU}(W_{gate}\, y) \odot F'\big)$, with $F'$ one step of `p_laplacian` on $F = W_{down}\,$nodes.

    Features are split into heads, one for each head of the graph. $\mu = \mu_0 (2 + \tanh t)$ with a learned t, 0 at first.

    Args:
        dim: width of the tokens.
        num_heads: heads of the graph.
        p: exponent.
        learned_p: whether p is a parameter that begins there.
        mu: $\mu_0$.
        reduction: the features have ``dim / reduction`` channels.

    Raises:
        ValueError: for p below 1, a mu that is not positive, or a reduction whose width the heads do not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        p: float = 1.5,
        learned_p: bool = False,
        mu: float = 0.1,
        reduction: int = 8,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if p < 1:
            raise ValueError(f"p: expected at least 1, got {p}")
        if mu <= 0:
            raise ValueError(f"mu: expected a positive number, got {mu}")
        if reduction < 1 or dim % (reduction * num_heads):
            raise ValueError(f"reduction: expected dim={dim} to be a multiple of reduction * {num_heads} heads, got {reduction}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.mu = num_heads, mu
        self.down = nn.Linear(dim, dim // reduction, **place)
        self.gate = nn.Linear(dim, dim // reduction, **place)
        self.up = nn.Linear(dim // reduction, dim, **place)
        self.mu_shift = nn.Parameter(torch.zeros((), **place))
        self.p: nn.Parameter | float = nn.Parameter(torch.full((), p, **place)) if learned_p else float(p)

    def forward(
        self,
        y: Float[Tensor, "b n c"],
        graph: Float[Tensor, "b h n m"],
        nodes: Float[Tensor, "b m c"],
        queries: Float[Tensor, "b n c"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """The update of the attention's output ``y``; ``queries`` are nodes of their own in a bipartite graph."""
        features = self._split(nodes)
        receivers = None if queries is None else self._split(queries)
        passed = p_laplacian(graph, features, self.p, self.mu * (2.0 + self.mu_shift.tanh()), queries=receivers)
        return self.up(F.gelu(self.gate(y)) * rearrange(passed, "b h n d -> b n (h d)"))

    def _split(self, nodes: Float[Tensor, "b m c"]) -> Float[Tensor, "b h m d"]:
        return rearrange(self.down(nodes), "b m (h d) -> b h m d", h=self.num_heads)


@mixers.register(
    "p_laplacian_adapter",
    family="graph",
    paper="p-laplacian-adapter",
    supports=Supports(
        causal="optional",
        pair_mask=True,
        grid=frozenset({1, 2, 3}),
        mixing_matrix=True,
        permutation_equivariant=True,
        cost=2.0,
    ),
    example={"reduction": 2},
)
class PLaplacianAdapter(GraphAdapter):
    r"""Attention with a p-adapter (Wu et al. 2023).

    With the map A, values V, output projection $W_o$ and $y = W_o A V$, features $F = W_{down} W_o V$ and their step $F'$ on the
    graph A (`p_laplacian`),

    $$\mathrm{out} = y + W_{up}\big(\mathrm{GELU}(W_{gate}\, y) \odot F'\big)$$

    The graph "self" has the tokens as nodes. "bipartite" has queries and keys as nodes of their own, of features
    $W_{down} W_o Q$ and $F$; it is the form for a context, and without one x is its own. By definition n x m maps and, for each
    pair, a difference of dim / reduction channels are formed: time and memory O(n m C).

    Args:
        dim: width of the tokens.
        num_heads: heads of the attention and of the features.
        p: exponent; the authors use 1.25 to 1.75.
        learned_p: whether p is learned.
        mu: at first half of how much a node keeps of itself.
        reduction: the features have ``dim / reduction`` channels.
        graph: "self" or "bipartite".
        pooled_keys: average the keys of a bipartite graph over this many segments, as the authors do with images; not causal.
        **options: those of `AttentionMixer`.

    Raises:
        UnsupportedError: for a context with the graph "self".
        ValueError: for an unknown graph, ``pooled_keys`` with causality or the graph "self", grouped heads, and what
            `PLaplacianUpdate` refuses.

    Differs from the paper: the residual and the LayerNorm after it are the block's. Segments are cut among the real keys.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        p: float = 1.5,
        learned_p: bool = False,
        mu: float = 0.1,
        reduction: int = 8,
        graph: str = "self",
        pooled_keys: int | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if graph not in GRAPHS:
            raise ValueError(f"graph: expected one of {GRAPHS}, got {graph!r}")
        if pooled_keys is not None and (pooled_keys < 1 or graph == "self" or self.causal):
            raise ValueError(
                f"pooled_keys: expected None, or at least 1 with graph='bipartite' and causal=False, got {pooled_keys}"
            )
        self.graph, self.pooled_keys = graph, pooled_keys
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.adapter = PLaplacianUpdate(dim, num_heads, p=p, learned_p=learned_p, mu=mu, reduction=reduction, **place)

    @property
    def supports(self) -> Supports:
        """A context needs a bipartite graph; pooled keys mix what a pair_mask tells apart, and depend on the order."""
        have: Supports = self.info.supports
        if "graph" not in vars(self):
            return have
        apart = self.pooled_keys is None
        return replace(have, cross=self.graph == "bipartite", pair_mask=apart, permutation_equivariant=apart)

    def update(
        self,
        x: Float[Tensor, "b n c"],
        y: Float[Tensor, "b n c"],
        graph: Float[Tensor, "b h n m"],
        q: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h m d"],
        masks: Masks,
    ) -> Float[Tensor, "b n c"]:
        """The gated low-rank update."""
        if self.pooled_keys is not None:
            real = torch.ones_like(v[:, 0, :, 0], dtype=torch.bool) if masks.key is None else masks.key
            means = segment_means(real, self.pooled_keys, v.dtype).unsqueeze(1)
            graph, v = graph @ means.transpose(2, 3), means @ v
        nodes, queries = (self.out_proj(rearrange(t, "b h m d -> b m (h d)")) for t in (v, q))
        return self.adapter(y, graph, nodes, queries if self.graph == "bipartite" else None)
