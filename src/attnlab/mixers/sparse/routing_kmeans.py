"""Routing attention: tokens attend inside clusters that k-means finds while the model learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.selection import group_tiles, sums_at, top_k
from attnlab.mixers.sparse.centroids import Centroids
from attnlab.ops.partials import Partial, merge
from attnlab.ops.tile_attention import tile_attention

FORMS = {"authors": ("counted", 1e-2), "port": ("renewed", 1e-5)}
"""The rule of the centroids, and what is added to the number of a token's clusters."""


class Members(NamedTuple):
    """The places of each tile's queries and keys, -1 for none, and the cluster of each tile."""

    queries: Int[Tensor, "b h t x"]
    keys: Int[Tensor, "b h t y"]
    cluster: Int[Tensor, "b h t"]


@mixers.register(
    "routing_kmeans",
    family="sparse",
    paper="routing-transformer",
    supports=Supports(causal="optional", mixing_matrix=True, permutation_equivariant=True, discontinuous=True, cost=1.0),
    example={"num_clusters": 3, "window": 4},
)
class RoutingKMeansAttention(AttentionMixer):
    r"""Attention inside clusters of online k-means, by another choice where causal (Roy et al. 2020, Routing Transformer).

    With routing vectors $\hat q, \hat k$, normalised, and centroids $\mu_c \in \mathbb{R}^d$ of each head (`Centroids`), cluster
    c takes the w queries and the w keys of the largest products with $\mu_c$, $Q_c$ and $K_c$, and

    $$o_i = \frac{1}{|\{c : i \in Q_c\}| + \varepsilon} \sum_{c : i \in Q_c} \sum_{j \in K_c} \mathrm{softmax}_j(s_{ij})\, v_j$$

    so that a token may be in several clusters or, with o = 0, in none. No gradient passes the choice. In training the centroids
    follow the routing vectors after each call. Time O(n C d + C w^2 d) for C clusters, O(n C d + n w d) where causal.

    The published choice looks at the whole sequence: ``hide_later`` hides later keys inside a cluster, as the authors do in
    training, but whether a token is among the best w depends on later ones. So causal=True chooses otherwise: each query and key
    belongs to its nearest centroid alone; a cluster's members in order, a token's key before its query (they are one with
    ``shared_qk``), are cut into runs of w, and a query attends to the keys up to its own in its run and the run before.

    ``record`` collects "selection" (b, h, t, w), the queries of each tile, "selected_keys" and "commitment_loss", the mean
    squares between routing vectors and centroids times ``beta``.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        num_clusters: C, a head.
        window: w.
        form: "authors", with layer-normalised vectors that attention uses too, s = $\hat q^\top \hat k$ and $\varepsilon$ = 0.01;
            or "port", the public PyTorch port: vectors of length 1, $s = d^{-1/2} q^\top k$ and $\varepsilon = 10^{-5}$.
        shared_qk: keys are the queries; in the port's form a token then sees itself only for want of others.
        num_memory: learned keys and values of each cluster, which no mask hides.
        hide_later: a query uses no later key; only with causal=False, where the choice looks ahead.
        decay: of the centroids.
        beta: factor of the loss.
        generator: draws the first centroids.
        **options: those of `AttentionMixer`; ``num_kv_heads`` must be all and ``position`` "none" or "rotary".

    Raises:
        ValueError: for numbers out of range, or options that do not fit each other.

    Differs from the paper: see above for causal=True, which has no $\varepsilon$ either. Masked tokens are in no cluster; in the
    port they take places. `mixing_matrix` is that of the tokens' values, without the memory's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_clusters: int = 8,
        window: int = 64,
        form: str = "authors",
        shared_qk: bool = False,
        num_memory: int = 0,
        hide_later: bool = False,
        decay: float | int = 0.999,
        beta: float | int = 1e-4,
        generator: torch.Generator | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        self.hide_later = hide_later
        super().__init__(dim, num_heads, **options)
        if window < 1 or num_memory < 0:
            raise ValueError(f"window, num_memory: expected at least 1 and 0, got {window} and {num_memory}")
        if form not in FORMS:
            raise ValueError(f"form: expected one of {tuple(FORMS)}, got {form!r}")
        if self.num_kv_heads != num_heads:
            raise ValueError(f"num_kv_heads: expected {num_heads}, since a head's clusters hold both, got {self.num_kv_heads}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}")
        if hide_later and self.causal:
            raise ValueError("hide_later: expected False with causal=True, whose choice does not look ahead either, got True")
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        rule, self.eps = FORMS[form]
        self.window, self.form, self.shared_qk, self.beta = window, form, shared_qk, float(beta)
        self.centroids = Centroids(num_heads, num_clusters, self.head_dim, decay=decay, rule=rule, generator=generator, **place)
        self.num_memory = num_memory
        if num_memory:
            shape = (num_heads, num_clusters, num_memory, self.head_dim)
            self.memory_keys, self.memory_values = (nn.Parameter(torch.randn(shape, **place)) for _ in range(2))
        if shared_qk:
            for name in ("k_proj", "k_norm"):
                self.register_module(name, nn.Identity())

    @property
    def supports(self) -> Supports:
        """Later keys have an order."""
        return replace(self.info.supports, permutation_equivariant=False) if self.hide_later else self.info.supports

    def project(
        self, x: Float[Tensor, "b n c"], context: Tensor | None = None, index: Int[Tensor, "#b n"] | None = None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
        """Queries, keys and values; the queries are the keys where these are shared."""
        if not self.shared_qk:
            return super().project(x, context, index)
        q, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.v_proj))
        q = self.q_norm(q)
        q = self.position.encode(q, torch.arange(x.shape[1], device=x.device)[None] if index is None else index)
        return q, q, v

    def choose(
        self, similar_q: Float[Tensor, "b h n c"], similar_k: Float[Tensor, "b h n c"], mask: Bool[Tensor, "b n"] | None
    ) -> Members:
        """The members of each cluster by their products with the centroids; causal where the mixer is."""
        if self.causal:
            return self._in_runs(similar_q.argmax(-1), similar_k.argmax(-1), mask)
        places = []
        for similar in (similar_q, similar_k):
            allowed = None if mask is None else mask[:, None, None].expand_as(similar.mT)
            best = top_k(similar.mT, self.window, allowed)
            places.append(best.sort(dim=-1).values)
        cluster = torch.arange(similar_q.shape[-1], device=similar_q.device)
        return Members(places[0], places[1], cluster.expand(*places[0].shape[:3]))

    def _in_runs(
        self, nearest_q: Int[Tensor, "b h n"], nearest_k: Int[Tensor, "b h n"], mask: Bool[Tensor, "b n"] | None
    ) -> Members:
        """The members of each cluster in runs: a query's keys are those of its run and the one before."""
        number = self.centroids.counts.shape[1]
        if self.shared_qk:
            group, per_token = nearest_q, 1
        else:
            group, per_token = torch.stack((nearest_k, nearest_q), dim=-1).flatten(2), 2
        if mask is not None:
            group = group.masked_fill(~mask.repeat_interleave(per_token, dim=1)[:, None], -1)
        runs, cluster = group_tiles(group, number, self.window)
        token = torch.where(runs < 0, -1, runs // per_token)
        queries = keys = token
        if per_token == 2:
            queries, keys = (token.masked_fill(runs % 2 != which, -1) for which in (1, 0))
        before = F.pad(keys[:, :, :-1], (0, 0, 1, 0), value=-1)
        follows = F.pad(cluster[:, :, 1:] == cluster[:, :, :-1], (1, 0), value=False)
        return Members(queries, torch.cat((before.masked_fill(~follows.unsqueeze(-1), -1), keys), dim=-1), cluster)

    def inside(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n e"],
        members: Members,
        key_mask: Bool[Tensor, "b n"] | None,
        memory_values: Float[Tensor, "h c m e"] | None = None,
    ) -> Float[Tensor, "b h n e"]:
        """Attention inside clusters, and the mean over a token's clusters; without their values memory keys take weight alone."""
        scale = 1.0 if self.form == "authors" else None
        part = tile_attention(
            q,
            k,
            v,
            members.queries,
            members.keys,
            bias=self._own_last(members, q),
            causal=self.causal or self.hide_later,
            key_mask=key_mask,
            scale=scale,
        )
        if self.num_memory:
            slots = torch.arange(self.num_memory, device=q.device) + members.cluster.unsqueeze(-1) * self.num_memory
            slots = slots.masked_fill((members.cluster < 0).unsqueeze(-1), -1)
            values = v.new_zeros(*self.memory_keys.shape[:3], v.shape[-1]) if memory_values is None else memory_values
            kept, given = (x.flatten(1, 2).expand(len(q), -1, -1, -1).to(q.dtype) for x in (self.memory_keys, values))
            other = tile_attention(q, kept, given, members.queries, slots, scale=scale)
            flat, more = (Partial(p.output.flatten(2, 3), p.lse.flatten(2, 3)) for p in (part, other))
            part = Partial(merge(flat, more).output.view_as(part.output), part.lse)
        total, count = sums_at(part.output, members.queries, q.shape[2])
        return total if self.causal else total / (count.to(total.dtype) + self.eps).unsqueeze(-1)

    def _own_last(self, members: Members, q: Tensor) -> Float[Tensor, "1 1 x y"] | None:
        """What keeps a token from itself: as a tile's keys end with its queries, that is a diagonal."""
        if not (self.shared_qk and self.form == "port"):
            return None
        x, y = members.queries.shape[-1], members.keys.shape[-1]
        bias = -5e4 * torch.eye(x, device=q.device, dtype=q.dtype)
        return F.pad(bias, (y - x, 0))[None, None]

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """What clusters make of the tokens' values."""
        q, k, members = self._routed(q, k, masks.key)[:3]
        return self.inside(q, k, v, members, masks.key)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Project, route, attend, project back, and let the centroids follow."""
        q, k, v = self.project(x, context, self.place(x, masks.query))
        q_used, k_used, members, routing = self._routed(q, k, masks.query)
        heads = self.inside(q_used, k_used, v, members, masks.query, self.memory_values if self.num_memory else None)
        self.emit("selection", members.queries)
        self.emit("selected_keys", members.keys)
        self.emit("commitment_loss", lambda: self.commitment(routing, masks.query))
        self.show(q, k, v, heads, masks, grid)
        if self.training:
            self.learn(routing, masks.query)
        return self.join(heads, x, masks.query)

    def commitment(self, routing: list[tuple[Tensor, Tensor]], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, ""]:
        """The loss of routing vectors with their nearest centroids: of queries and keys the sum, or in the port the mean."""
        total = torch.stack([self.centroids.distance(vectors, nearest, mask) for vectors, nearest in routing])
        return self.beta * (total.sum() if self.form == "authors" else total.mean())

    def learn(self, routing: list[tuple[Tensor, Tensor]], mask: Bool[Tensor, "b n"] | None) -> None:
        """Move the centroids on by queries and then keys, or by both at once in the port."""
        if self.form == "port":
            vectors, nearest = (torch.cat(both, dim=2) for both in zip(*routing, strict=True))
            routing, mask = [(vectors, nearest)], None if mask is None else mask.repeat(1, len(routing))
        for vectors, nearest in routing:
            self.centroids.update(vectors, nearest, mask)

    def _routed(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Tensor, Tensor, Members, list[tuple[Tensor, Tensor]]]:
        """Queries and keys as attention uses them, the members, and the vectors that are routed with their nearest centroids."""
        vectors = [self.centroids.normalized(q)]
        if not self.shared_qk:
            vectors.append(self.centroids.normalized(k))
        similar = [self.centroids.similarity(x) for x in vectors]
        members = self.choose(similar[0], similar[-1], mask)
        if self.form == "authors":
            q, k = vectors[0], vectors[-1]
        return q, k, members, [(x, s.argmax(-1)) for x, s in zip(vectors, similar, strict=True)]
