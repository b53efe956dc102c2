"""Sparse state expansion: a state of many partitions, of which each token writes and reads few."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.dynamics import Dynamics
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.parts.decay import ChannelDecay, StepDecay
from attnlab.mixers.parts.norms import l2_normalize
from attnlab.mixers.parts.partitioned import Routing, run_partitions
from attnlab.mixers.parts.routing import balance_loss, top_k_mask
from attnlab.mixers.parts.short_convolution import ShortConvolution
from attnlab.mixers.parts.steps import Steps, carry
from attnlab.ops.backends import accumulate_dtype

RULES = ("gla", "gdn")


def _weigh_then_normalize(x: Tensor, factor: Tensor) -> Tensor:
    """Length 1 whatever the weight, but for the norm's epsilon."""
    return l2_normalize(x * factor)


class _LowRank(nn.Sequential):
    """$W_2 W_1 x$ without biases."""

    def __init__(self, dim: int, rank: int, width: int, place: dict[str, Any]) -> None:
        super().__init__(nn.Linear(dim, rank, bias=False, **place), nn.Linear(rank, width, bias=False, **place))


@mixers.register(
    "sparse_state_expansion",
    family="linear",
    paper="sparse-state-expansion",
    supports=Supports(
        causal="always",
        streaming=True,
        mixing_matrix=True,
        state="bounded",
        associative=True,
        dynamics=True,
        discontinuous=True,
        cost=1.0,
    ),
)
class SparseStateExpansion(StreamingMixer):
    r"""Sparse state expansion, SSE (Pan et al. 2025), on gated linear attention or the gated delta rule.

    With $\eta = \mathrm{softmax}(W_e x) \in \mathbb{R}^N$, its largest entries $\mathcal{W}$ written and $\mathcal{R}$ read,

    $$S^0_t = a^0_t \odot S^0_{t-1} + k^0_t v_t^\top, \qquad
      S^n_t = a^1_t \odot S^n_{t-1} + \eta_n k^1_t v_t^\top \text{ for } n \in \mathcal{W}, \text{ else } S^n_{t-1},$$
    $$o_t = d^{-1/2} \Big( S_t^{0\top} q^0_t + \sum_{n \in \mathcal{R}} \eta_n S_t^{n\top} q^1_t \Big), \qquad
      y = W_o (\mathrm{RMSNorm}(o) \odot \mathrm{SiLU}(G_2 G_1 x)),$$

    and for ``rule="gdn"`` the gated delta rule in place of the two sums. $k^1 = k^0 + B_k A_k x$ before the activation, q alike.
    Partitions share all parameters: the state grows with N, parameters and the work a token do not. Time O(n k d^2) for k
    partitions a token; tokens are sorted by partition and each runs over its own. State: ``shared`` (b, h, d, e), ``partitions``
    (b, N, h, d, e) in float32 or wider, and the windows of the convolutions. ``record`` collects "routing" (b, n, N) and
    "balance_loss" $N / |\mathcal{W}| \sum_n \bar\eta_n \bar f_n$ over real tokens, f the share of tokens that write to n.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        causal: always True.
        rule: "gla" (softmax over the channels of keys, a decay a channel) or "gdn" (keys and queries of length 1, a decay a
            head).
        num_partitions: N.
        num_writers: $|\mathcal{W}|$.
        num_readers: $|\mathcal{R}|$.
        head_dim: d; by default dim / num_heads.
        expand_v: e / d.
        key_softmax: softmax over the channels of keys, else SiLU; by default with "gla" alone.
        query_softmax: the same for queries.
        weigh_unit: with "gdn" the weights multiply queries and keys of length 1, as in the paper's equations; without, they come
            before the norm, which undoes them, as in the port.
        conv_size: taps of short causal convolutions of queries and keys before their correction; 0 for none.
        norm_eps: of the output norm.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=False``.
        ValueError: for an unknown rule, or as many writers or readers as partitions or none.

    Differs from the paper: there is no code of its authors; this is what a port under the paper's name does, whose recordings it
    matches. In "gdn" without ``weigh_unit`` next to no gradient of the output reaches the router. A masked token neither writes,
    decays nor is routed.
    """

    memory = ("shared", "partitions")

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        causal: bool = True,
        rule: str = "gla",
        num_partitions: int = 4,
        num_writers: int = 1,
        num_readers: int = 1,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        key_softmax: bool | None = None,
        query_softmax: bool = False,
        weigh_unit: bool = False,
        conv_size: int = 0,
        norm_eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if rule not in RULES:
            raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")
        for name, count in (("num_writers", num_writers), ("num_readers", num_readers)):
            if not 1 <= count < num_partitions:
                raise ValueError(f"{name}: expected 1 to num_partitions - 1 = {num_partitions - 1}, got {count}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rule, self.num_partitions = rule, num_partitions
        self.num_writers, self.num_readers = num_writers, num_readers
        self.key_softmax = rule == "gla" if key_softmax is None else key_softmax
        self.query_softmax, self.weigh_unit = query_softmax, weigh_unit
        self.key_dim = dim // num_heads if head_dim is None else head_dim
        self.value_dim = round(self.key_dim * expand_v)
        keys, values = num_heads * self.key_dim, num_heads * self.value_dim
        self.q_proj, self.k_proj = (nn.Linear(dim, keys, bias=False, **place) for _ in range(2))
        self.v_proj = nn.Linear(dim, values, bias=False, **place)
        self.q_correction, self.k_correction = (_LowRank(dim, self.value_dim, keys, place) for _ in range(2))
        self.e_proj = nn.Linear(dim, num_partitions, bias=False, **place)
        self.g_proj = _LowRank(dim, self.value_dim, values, place)
        self.out_norm = nn.RMSNorm(self.value_dim, eps=norm_eps, **place)
        self.out_proj = nn.Linear(values, dim, bias=False, **place)
        self.b_proj = nn.Linear(dim, 2 * num_heads, bias=False, **place) if rule == "gdn" else None
        self.decays = nn.ModuleList(
            ChannelDecay(dim, num_heads, self.key_dim, **place) if rule == "gla" else StepDecay(dim, num_heads, **place)
            for _ in range(2)
        )
        self.convs = nn.ModuleDict(
            {name: ShortConvolution(keys, conv_size, **place) for name in ("q", "k")[: 2 * bool(conv_size)]}
        )
        self.lookback = max(0, conv_size - 1)

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """Empty states and windows."""
        shape = (batch_size, self.num_partitions, self.num_heads, self.key_dim, self.value_dim)
        empty = torch.zeros(shape, device=device, dtype=accumulate_dtype(dtype))
        windows = {f"window_{name}": conv.begin(batch_size, device, dtype) for name, conv in self.convs.items()}  # type: ignore[operator]
        return State({"shared": empty[:, 0].clone(), "partitions": empty, **windows})

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Write to the shared state and to those chosen, read, normalise, gate."""
        (shared, routed), windows = self._project(x, state, mask)
        routing = self._route(x, mask)
        heads, total = shared.run(state["shared"])
        more, partitions = run_partitions(routed, routing, state["partitions"])
        heads = heads + more
        self.emit("values", shared.v)
        self.emit("mixed", heads)
        self.emit("routing", routing.weights)
        self.emit("balance_loss", lambda: balance_loss(routing.weights, routing.writes, mask) / self.num_writers)
        gate = F.silu(rearrange(self.g_proj(x), "b n (h e) -> b n h e", h=self.num_heads))
        y = self.out_proj((self.out_norm(heads.transpose(1, 2).to(self.out_norm.weight.dtype)) * gate).flatten(2))
        return y, State({"shared": total, "partitions": partitions, **windows})

    def digest(self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None) -> State:
        """What the piece leaves in each state, and of what it held."""
        (shared, routed), _ = self._project(x, state, mask)
        routing = self._route(x, mask)
        parts = [routing.own(routed, n)[0].digest() for n in range(self.num_partitions)]
        written, kept = shared.digest()
        return State(
            {
                "shared": written,
                "partitions": torch.stack([part[0] for part in parts], 1),
                "carry_shared": kept,
                "carry_partitions": torch.stack([part[1] for part in parts], 1),
            }
        )

    def fold(self, earlier: State, later: State) -> dict[str, Tensor]:
        """Each state by itself."""
        folded = {name: carry(later[f"carry_{name}"], earlier[name]) + later[name] for name in self.memory}
        if "carry_shared" not in earlier:
            return folded
        return folded | {name: carry(later[name], earlier[name]) for name in ("carry_shared", "carry_partitions")}

    def recurrence(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Dynamics:
        """All states as one: a partition that a token does not write to keeps what it holds."""
        (shared, routed), _ = self._project(x, self.begin(x.shape[0], x.device, x.dtype), mask)
        routing = self._route(x, mask)
        parts = [shared.recurrence(), *(routing.steps(routed, n).recurrence() for n in range(self.num_partitions))]
        if parts[0].diagonal:
            transition = torch.cat([part.transition for part in parts], -1)
        else:
            blocks = [part.transition.flatten(0, 2) for part in parts]
            whole = torch.stack([torch.block_diag(*each) for each in zip(*blocks, strict=True)])
            transition = whole.unflatten(0, parts[0].transition.shape[:3])
        return Dynamics(transition, *(torch.cat([getattr(part, name) for part in parts], -1) for name in ("input", "output")))

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What the operator makes of identity values."""
        (shared, routed), _ = self._project(x, self.begin(x.shape[0], x.device, x.dtype), masks.query)
        identity = torch.eye(x.shape[1], device=x.device, dtype=x.dtype).expand(*shared.v.shape[:2], -1, -1)
        routing = self._route(x, masks.query)
        return shared._replace(v=identity).run()[0] + run_partitions(routed._replace(v=identity), routing, None)[0]

    def _route(self, x: Tensor, mask: Tensor | None) -> Routing:
        """The weights, and which partitions each real token writes and reads."""
        weights = self.e_proj(x).softmax(dim=-1)
        writes, reads = top_k_mask(weights, self.num_writers), top_k_mask(weights, self.num_readers)
        real = torch.ones_like(writes) if mask is None else mask.unsqueeze(-1)
        weigh = _weigh_then_normalize if self.rule == "gdn" and not self.weigh_unit else torch.mul
        return Routing(weights, writes & real, reads & real, weigh)

    def _project(self, x: Tensor, state: State, mask: Tensor | None) -> tuple[tuple[Steps, Steps], dict[str, Tensor]]:
        """The shared and the routed branch's steps."""
        first = {"q": self.q_proj(x), "k": self.k_proj(x)}
        windows = {}
        for name, conv in self.convs.items():
            first[name], windows[f"window_{name}"] = conv(first[name], state[f"window_{name}"])
        second = {"q": first["q"] + self.q_correction(x), "k": first["k"] + self.k_correction(x)}
        v = self._heads(F.silu(self.v_proj(x)))
        betas: tuple[Tensor | None, ...] = (None, None)
        if self.b_proj is not None:
            betas = self.b_proj(x).sigmoid().transpose(1, 2).unsqueeze(-1).chunk(2, dim=1)
        branches: list[Steps] = []
        for parts, decay, beta in zip((first, second), self.decays, betas, strict=True):
            q, k = self._activate(parts["q"], self.query_softmax), self._activate(parts["k"], self.key_softmax)
            if self.rule == "gdn" and (self.weigh_unit or not branches):
                q, k = l2_normalize(q), l2_normalize(k)
            branches.append(Steps(q, k, v, decay(x), beta, self.key_dim**-0.5).masked(mask))
        return (branches[0], branches[1]), windows

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)

    def _activate(self, x: Float[Tensor, "b n c"], normalized: bool) -> Float[Tensor, "b h n d"]:
        x = self._heads(x)
        return x.softmax(dim=-1) if normalized else F.silu(x)
