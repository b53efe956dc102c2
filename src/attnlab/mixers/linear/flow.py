"""Flow attention: linear attention in which sources compete for, and sinks share out, conserved flows."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
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
from attnlab.mixers.linear.core import real_only
from attnlab.mixers.parts.features import feature_map as named_map
from attnlab.ops.backends import accumulate_dtype
from attnlab.ops.chunks import full_precision
from attnlab.ops.flow_attention import Flows, FlowSums, flow_attention
from attnlab.ops.linear_attention import linear_attention

_MAPS = ("sigmoid", "relu", "squared_relu", "elu", "softplus", "exp", "softmax")
_SUMS = ("keys", "queries", "sources", "sinks")


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

    for n queries and m keys. Where causal (`attnlab.ops.flow_attention`) every sum runs up to the current token, whichever side
    it is on, f is the number of tokens so far, m the same in $c_j$, and n / m is left out: what competes with source j came
    before it, and $c_j$ is not computed anew for later queries. Time O(n d^2), memory O(n d). State: sums of keys, queries, keys
    over outflows ("sources"), queries over inflows ("sinks"), competition, and products ("sum" (b, h, d, d)), and the number of
    tokens.

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
        q, k = self._features_of(q, k)
        if self.causal:
            return self._run(q, k, v, masks.key)[0].to(v.dtype)
        q, k = self._weighed(q, k, masks)
        return linear_attention(q, k, v, causal=False)[0].to(v.dtype)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No flow yet."""
        h, d, wide = self.num_heads, self.head_dim, accumulate_dtype(dtype)
        widths = {"sum": (d, d), "competition": (1,), **dict.fromkeys(_SUMS, (d,))}
        state = {name: torch.zeros(batch_size, h, *width, device=device, dtype=wide) for name, width in widths.items()}
        return State({**state, "number": torch.zeros(batch_size, device=device, dtype=torch.int64)})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Go on from the sums."""
        q, k, v = self.project(x)
        q, k = self._features_of(q, k)
        sums = {name: state[name] for name in _SUMS}
        initial = FlowSums(state["sum"], **sums, competition=state["competition"].squeeze(-1), number=state["number"])
        heads, _, after = self._run(q, k, v, mask, initial)
        found = {name: getattr(after, name) for name in (*_SUMS, "number")}
        last = State({"sum": after.products, "competition": after.competition.unsqueeze(-1), **found})
        return self.join(heads.to(v.dtype), x, mask), last

    def recurrence(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        """Nothing decays; the weighted keys enter and the weighted queries read."""
        q, k, v = self.project(x)
        q, k = self._features_of(q, k)
        _, flows, _ = self._run(q, k, v, mask)
        number = torch.ones_like(q[:, 0, :, 0]).cumsum(1) if mask is None else mask.to(q.dtype).cumsum(1).clamp(min=1.0)
        reading = flows.allocation / (flows.inflow * number[:, None])
        weighed = k * flows.competition.unsqueeze(-1)
        return Dynamics(torch.ones_like(weighed), weighed, real_only(q * reading.unsqueeze(-1), mask))

    def _features_of(self, q: Tensor, k: Tensor) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"]]:
        """Features in float32 or wider."""
        wide = accumulate_dtype(q.dtype)
        return self.features(q.to(wide)), self.features(k.to(wide))

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "b n"] | None, initial: FlowSums | None = None
    ) -> tuple[Float[Tensor, "b h n e"], Flows, FlowSums]:
        """The causal form, with what it tells of itself."""
        heads, flows, after = flow_attention(q, k, v, eps=self.eps, mask=mask, initial=initial)
        self.emit("allocation", flows.allocation)
        self.emit("competition", flows.competition)
        return heads, flows, after

    @full_precision
    def _weighed(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], masks: Masks
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h m d"]]:
        """Queries times allocation over inflow, keys times competition, where every sum is over all tokens."""
        q, k = real_only(q, masks.query), real_only(k, masks.key)
        n, m = (self._numbers(x, mask) for x, mask in ((q, masks.query), (k, masks.key)))
        inflow, outflow = self._product(q, k), self._product(k, q)
        conserved_in, conserved_out = self._product(q, k / outflow), self._product(k, q / inflow)
        allocation = torch.sigmoid(conserved_in * (n / m))
        strength = real_only(conserved_out.clamp(-1.0, 1.0).exp(), masks.key)
        rivals = strength.sum(2, keepdim=True)
        competition = strength / rivals.masked_fill(rivals == 0, 1.0) * m
        self.emit("allocation", allocation.squeeze(-1))
        self.emit("competition", competition.squeeze(-1))
        return q * (allocation / inflow), k * competition

    def _numbers(self, x: Tensor, mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b 1 1 1"]:
        """How many real tokens there are, at least 1."""
        if mask is None:
            return x.new_full((x.shape[0], 1, 1, 1), float(x.shape[2]))
        return mask.sum(1).clamp(min=1).to(x.dtype)[:, None, None, None]

    def _product(self, a: Float[Tensor, "b h n d"], of: Float[Tensor, "b h m d"]) -> Float[Tensor, "b h n 1"]:
        r"""$(a + \epsilon)^\top (t + \epsilon)$ for each a and the sum t of the others."""
        total = of.sum(2, keepdim=True) + self.eps
        return a @ total.mT + self.eps * total.sum(-1, keepdim=True)
