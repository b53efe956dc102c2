"""Top-m aggregation: attention to the m tokens that are most like a learned probe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.tilings import segments_of
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.selection import top_k
from attnlab.ops.tile_attention import tile_attention

ROWS = 64
"""Queries of a tile."""


@mixers.register(
    "top_m_aggregation",
    family="sparse",
    paper="tangnn",
    supports=Supports(grid=frozenset({1, 2, 3}), mixing_matrix=True, permutation_equivariant=True, discontinuous=True, cost=1.0),
    example={"num_selected": 3},
)
class TopMAggregation(AttentionMixer):
    r"""Attention over the m tokens nearest to a probe, for sets and graphs (E et al. 2024, TANGNN, arXiv 2411.15458).

    With a learned probe a, $s_i = \cos(\mathrm{relu}(x_i), a)$ and S the m tokens with the largest $s_i$, all heads alike,

    $$z_i = \sum_{j \in S} \mathrm{softmax}_{j \in S}(d^{-1/2} q_i^\top k_j)\, v_j \qquad
      \text{or} \qquad z_i = t = \frac{1}{m} \sum_{l \in S} z_l$$

    for mode "per_node", and "summary", which all tokens share. The choice is hard: a has no gradient unless ``score_weighted``,
    which takes $s_j v_j$ for $v_j$. The local branch beside it is "sage"; what joins them is the model's.

    ``record`` collects "selection" (b, m), the places in order of s, -1 for none. Time O(n m d), of "summary" O(m^2 d) beside
    the projections; memory O(n d).

    Args:
        dim: width of the tokens.
        num_heads: heads; 1 in the paper.
        num_selected: m.
        mode: "per_node" or "summary".
        score_weighted: see above.
        **options: those of `AttentionMixer`; no position, tokens have no order.

    Raises:
        ValueError: for fewer than one token, an unknown mode, or a position.
        UnsupportedError: with ``causal=True``.

    Differs from the paper: a has the width of the tokens, where the authors' code puts ones for it if widths differ; the layer
    norms and the feed-forward of its transformer layer are the block's. Their main file computes the attention and does not use
    it, and repeats S cyclically over the nodes, which depends on their order: both are left out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        num_selected: int = 25,
        mode: str = "per_node",
        score_weighted: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if num_selected < 1:
            raise ValueError(f"num_selected: expected at least 1, got {num_selected}")
        if mode not in ("per_node", "summary"):
            raise ValueError(f"mode: expected 'per_node' or 'summary', got {mode!r}")
        if self.position_name != "none":
            raise ValueError(f"position: expected 'none', got {self.position_name!r}; tokens have no order")
        self.num_selected, self.mode, self.score_weighted = num_selected, mode, score_weighted
        self.probe = nn.Parameter(torch.randn(dim, device=options.get("device"), dtype=options.get("dtype")))

    def similarity(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
        """s of each token."""
        return similarity(x, self.probe)

    def select(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Int[Tensor, "b m"]:
        """The places of S, the most similar first, -1 for none."""
        return top_k(self.similarity(x).detach(), self.num_selected, mask)

    @torch.no_grad()
    def turn_away(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> None:
        r"""$a \leftarrow \mathrm{normalise}(a - (a^\top \bar x) \bar x)$, with the mean of all real tokens of the batch."""
        mean = x[mask].mean(0) if mask is not None else x.mean((0, 1))
        self.probe.copy_(F.normalize(self.probe - (self.probe @ mean) * mean, dim=0))

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Choose, attend, project back."""
        q, k, v = self.project(x)
        chosen = self.select(x, masks.query)
        heads = self._read(x, q, k, v, chosen)
        self.emit("selection", chosen)
        self.emit("values", v)
        self.emit("mixed", heads)
        self.emit("attention", lambda: self._read(x, q, k, self.identity(k), chosen))
        return self.join(heads, x, masks.query)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What identity values become."""
        q, k, _ = self.project(x)
        return self._read(x, q, k, self.identity(k), self.select(x, masks.query))

    def _read(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        """Attention of all tokens, or of the chosen and its mean, to the chosen."""
        n = x.shape[1]
        if self.score_weighted:
            v = v * self.similarity(x)[:, None, :, None]
        keys = chosen[:, None, None]
        if self.mode == "summary":
            inside = tile_attention(q, k, v, keys, keys).output.squeeze(2)
            number = (chosen >= 0).sum(-1).clamp(min=1).to(inside.dtype)[:, None, None]
            return (inside.sum(2) / number).unsqueeze(2).expand(-1, -1, n, -1)
        queries = segments_of(n, min(ROWS, n)).to(x.device)
        found = tile_attention(q, k, v, queries[None, None], keys.expand(-1, -1, len(queries), -1))
        return found.output.flatten(2, 3)[:, :, :n]


def similarity(x: Float[Tensor, "b n c"], probe: Float[Tensor, "c"]) -> Float[Tensor, "b n"]:
    """The cosine of each token's positive part and the probe, 0 where it has none."""
    return F.normalize(x.relu(), dim=-1) @ F.normalize(probe, dim=0)
