"""Flow attention: linear attention in which sources compete for, and sinks share out, conserved flows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.dynamics import Dynamics
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.linear.core import real_only, running_sum
from attnlab.mixers.parts.features import feature_map as named_map
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import full_precision
from attnlab.ops.linear_attention import linear_attention

_MAPS = ("sigmoid", "relu", "squared_relu", "elu", "softplus", "exp", "softmax")
_SUMS = ("keys", "queries", "sources", "sinks", "competition")


class Flows(NamedTuple):
    r"""Weighted sides of the flow map $R_i = \hat q_i^\top \sum_j \hat k_j v_j^\top$, and the sums that a stream goes on from.

    Args:
        q: queries times allocation and reciprocal inflow.
        k: keys times competition.
        after: what a stream keeps, all but the products.
    """

    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b h m d"]
    after: dict[str, Tensor]


@mixers.register(
    "flow",
    family="linear",
    paper="flowformer",
    supports=Supports(
        causal="optional",
        cross=True,
        streaming=True,
        grid=frozenset({1, 2, 3}),
        mixing_matrix=True,
        permutation_equivariant=True,
        state="bounded",
        dynamics=True,
        cost=1.0,
    ),
)
class FlowAttention(AttentionMixer, StreamingMixer):
    r"""Flow attention (Wu et al. 2022, Flowformer, equations 4 to 8).

    Queries are sinks and keys are sources of a flow network with capacities $Q_i^\top K_j$, features $\phi$ = sigmoid. With
    $\langle a, b \rangle = (a + \epsilon)^\top (b + \epsilon)$, and f = 1,

    $$I_i = f^{-1} \langle Q_i, \textstyle\sum_j K_j \rangle, \quad O_j = f^{-1} \langle K_j, \sum_i Q_i \rangle, \quad
      \hat I_i = f^{-1} \langle Q_i, \sum_j K_j / O_j \rangle, \quad
      \hat O_j = f^{-1} \langle K_j, \sum_i Q_i / I_i \rangle$$

    $$o_i = \sigma\Big(\frac{n}{m} \hat I_i\Big) \frac{Q_i^\top}{f I_i} \sum_j K_j\, c_j\, v_j^\top, \qquad
      c_j = m\, \frac{e^{\hat O_j}}{\sum_l e^{\hat O_l}}, \quad \hat O \text{ cut to } [-1, 1]$$

    for n queries and m keys. Where causal every sum runs up to the current token, whichever side it is on, f is the number of
    tokens so far, m the same in $c_j$, and n / m is left out: what competes with source j came before it, and $c_j$ is not
    computed anew for later queries. Time O(n d^2), memory O(n d). State: sums of keys, queries, keys over outflows ("sources"),
    queries over inflows ("sinks"), competition, and products ("sum" (b, h, d, d)), and the number of tokens.

    A source's outflow depends on the queries before it, so that pieces cannot be summed up apart.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        feature_map: $\phi$, "sigmoid", "relu", "squared_relu", "elu", "softplus", "exp" or "softmax".
        eps: $\epsilon$, added to every entry of both factors.
        **options: those of `AttentionMixer`; ``qkv_bias`` is True by default, ``num_kv_heads`` must be all, ``position`` "none".

    Raises:
        ValueError: for an unknown feature map, an ``eps`` that is not positive, grouped keys, or a position.

    Differs from the paper: masked tokens are in no sum, and n, m, f count real ones. The authors' dropout after the output
    projection is left to the block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        feature_map: str = "sigmoid",
        eps: float = 1e-6,
        **options: Unpack[AttentionOptions],
    ) -> None:
        given: AttentionOptions = {"qkv_bias": True, **options}
        super().__init__(dim, num_heads, **given)
        if self.num_kv_heads != num_heads:
            raise ValueError(f"num_kv_heads: expected {num_heads} (every head has its own flow), got {self.num_kv_heads}")
        if self.position_name != "none":
            raise ValueError(f"position: expected 'none' (flows are of a set), got {self.position_name!r}")
        if eps <= 0:
            raise ValueError(f"eps: expected a positive number, got {eps}")
        self.features, self.eps = named_map(feature_map, among=_MAPS), eps

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """The flow map on the values."""
        flows = self.flows(q, k, masks)
        return linear_attention(flows.q, flows.k, v, causal=self.causal)[0].to(v.dtype)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No flow yet."""
        h, d, wide = self.num_heads, self.head_dim, accumulate_dtype(dtype)
        widths = {name: (1,) if name == "competition" else (d,) for name in _SUMS}
        state = {
            name: torch.zeros(batch_size, h, *width, device=device, dtype=wide)
            for name, width in {**widths, "sum": (d, d)}.items()
        }
        return State({**state, "number": torch.zeros(batch_size, device=device, dtype=torch.int64)})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Add the new tokens to the sums, one depending on the other, and read."""
        q, k, v = self.project(x)
        flows = self.flows(q, k, Masks(mask, mask), state)
        heads, total = linear_attention(flows.q, flows.k, v, initial_state=state["sum"])
        return self.join(heads.to(v.dtype), x, mask), State({**flows.after, "sum": total})

    def recurrence(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        """Nothing decays; the weighted keys enter and the weighted queries read."""
        q, k, _ = self.project(x)
        flows = self.flows(q, k, Masks(mask, mask))
        return Dynamics(torch.ones_like(flows.k), flows.k, flows.q)

    @full_precision
    def flows(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], masks: Masks, state: State | None = None) -> Flows:
        """Both sides of the map, in float32 or wider."""
        wide = accumulate_dtype(q.dtype)
        q, k = real_only(self.features(q.to(wide)), masks.query), real_only(self.features(k.to(wide)), masks.key)
        queries, keys = (self._numbers(x, mask, state) for x, mask in ((q, masks.query), (k, masks.key)))
        after: dict[str, Tensor] = {}

        def total(name: str, x: Tensor) -> Tensor:
            found = running_sum(x, None if state is None else state[name].to(wide), causal=self.causal)
            after[name] = found[:, :, -1]
            return found

        n, m = (number.clamp(min=1).to(wide)[:, None, :, None] for number in (queries, keys))
        f = m if self.causal else torch.ones_like(m)
        inflow = self._product(q, total("keys", k)) / f
        outflow = self._product(k, total("queries", q)) / f
        conserved_in = self._product(q, total("sources", k / outflow)) / f
        conserved_out = self._product(k, total("sinks", q / inflow)) / f
        allocation = torch.sigmoid(conserved_in if self.causal else conserved_in * (n / m))
        strength = real_only(conserved_out.clamp(-1.0, 1.0).exp(), masks.key)
        rivals = total("competition", strength)
        competition = strength / rivals.masked_fill(rivals == 0, 1.0) * m
        self.emit("allocation", allocation.squeeze(-1))
        self.emit("competition", competition.squeeze(-1))
        return Flows(q * (allocation / (inflow * f)), k * competition, {**after, "number": keys[:, -1]})

    def _numbers(self, x: Tensor, mask: Bool[Tensor, "b n"] | None, state: State | None) -> Int[Tensor, "b #n"]:
        """How many real tokens there are up to each, or in all."""
        real = torch.ones(x.shape[0], x.shape[2], device=x.device, dtype=torch.int64) if mask is None else mask.long()
        number = real.cumsum(1) if self.causal else real.sum(1, keepdim=True)
        return number if state is None else number + state["number"][:, None]

    def _product(self, a: Float[Tensor, "b h n d"], total: Float[Tensor, "b h #n d"]) -> Float[Tensor, "b h n 1"]:
        r"""$(a + \epsilon)^\top (t + \epsilon)$ for each token's sum t, or the one of all."""
        total = total + self.eps
        product = a @ total.mT if total.shape[2] == 1 else (a * total).sum(-1, keepdim=True)
        return product + self.eps * total.sum(-1, keepdim=True)
