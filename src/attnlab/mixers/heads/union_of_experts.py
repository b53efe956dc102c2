"""Union of experts: each head attends among the tokens that its router sends there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.mixers.parts.routing import top_k_mask
from attnlab.ops.attention import attention

_PUBLISHED = Supports(mixing_matrix=True, batch_coupled=True, discontinuous=True)
_BY_TOKEN = replace(_PUBLISHED, causal="optional", batch_coupled=False)
_TINY = 1e-8


class Selection(NamedTuple):
    """Which tokens each head works on.

    Args:
        gates: softmax of the router (b, n, h).
        chosen: tokens a head takes (b, h, n).
        order: their places in rising order, and then others up to the longest (b, h, l).
        valid: which entries of ``order`` are taken (b, h, l).
    """

    gates: Float[Tensor, "b n h"]
    chosen: Bool[Tensor, "b h n"]
    order: Int[Tensor, "b h l"]
    valid: Bool[Tensor, "b h l"]


@mixers.register("union_of_experts", family="heads", paper="union-of-experts", supports=_PUBLISHED)
class UnionOfExperts(AttentionMixer):
    r"""Attention whose heads are experts, each among tokens of its own (Yang et al. 2025, selective multi-head attention).

    With E heads and the gates $p_t = \mathrm{softmax}(W_g x_t + b_g)$, token t is routed to the ``num_active`` heads of largest
    gate. Head e gathers its tokens $t_1 < \dots < t_{L_e}$, turns queries and keys by their ranks 1, 2, ... among these, and

    $$y_t = \sum_{e \ni t} \big(W_o^e\, o_{e,t} + b_o^e\big), \qquad
      o_{e,t} = \mathrm{softmax}_{s \in e}(d^{-1/2}\, q_{e,t}^\top k_{e,s})\, v_{e,s} .$$

    ``selection`` says what else a head takes. "batch", as published: all heads and examples of a batch take as many tokens as
    the head with the most routed ones; others of the example fill up, so that an example depends on its neighbours, and a token's
    heads on later tokens, even where attention among them is causal. "token": the routed ones alone, a choice of each token,
    which has a causal form. With all heads active both are multi-head attention.

    Time O(E L^2 d), about a quarter of dense for half of the heads; compiled, l is n. ``record`` collects "selected" (b, h, n),
    "gates" (b, n, h) and "route" (b, n, h), the routed gates divided by their sum over the batch, times its size.

    Args:
        dim: width of the tokens.
        num_heads: E.
        num_active: heads that a token is routed to; by default half.
        selection: "batch" or "token".
        rank_causal: a token attends only to those before it in its head; None for ``causal``. The authors' language model has it.
        straight_through: hand the gradient of a head's output to its gate, whose weight in the sum stays 1.
        **options: those of `AttentionMixer`; positions see ranks. By default "rotary", and biases of the input projections.

    Raises:
        ValueError: for a count that does not fit, an unknown selection, ``rank_causal=False`` where ``causal``, or a position
            that adds to the values.
        UnsupportedError: with ``causal=True`` and ``selection="batch"``.

    Differs from the paper: as in the authors' code the gates weigh nothing, so that the router has no gradient unless
    ``straight_through``. Which tokens fill up is left to their sort; here it is the first of the example, or what `hold` gives.
    Masked tokens are never taken. Ranks distort distances by definition. The residual and the norm are the block's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_active: int | None = None,
        selection: str = "batch",
        rank_causal: bool | None = None,
        straight_through: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> None:
        if selection not in ("batch", "token"):
            raise ValueError(f"selection: expected 'batch' or 'token', got {selection!r}")
        self._promises = _PUBLISHED if selection == "batch" else _BY_TOKEN
        given: AttentionOptions = {"position": "rotary", "qkv_bias": True, **options, "out_bias": False}
        super().__init__(dim, num_heads, **given)
        num_active = max(1, num_heads // 2) if num_active is None else num_active
        if not 1 <= num_active <= num_heads:
            raise ValueError(f"num_active: expected 1 to num_heads={num_heads}, got {num_active}")
        if self.causal and rank_causal is False:
            raise ValueError("rank_causal: expected True or None with causal=True, got False")
        if self.position.reads_values:
            raise ValueError(f"position: expected one that leaves the values alone, got {self.position_name!r}")
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.gate = nn.Linear(dim, num_heads, **place)
        self.expert_bias = nn.Parameter(torch.zeros(num_heads, dim, **place)) if options.get("out_bias", True) else None
        self.num_active, self.selection, self.straight_through = num_active, selection, straight_through
        self._promises = replace(self._promises, discontinuous=num_active < num_heads)
        self.rank_causal = self.causal if rank_causal is None else rank_causal
        self.fillers: Tensor | None = None

    @property
    def supports(self) -> Supports:
        """The promises of this form of selection; with all heads active there is no choice."""
        return self._promises

    def hold(self, fillers: Bool[Tensor, "b h n"] | None) -> None:
        """Fill up with these tokens, until None leaves it to the first ones again; for ``selection="batch"``."""
        self.fillers = fillers

    def select(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None) -> Selection:
        """Route the tokens."""
        gates = self.gate(x).softmax(dim=-1)
        routed = top_k_mask(gates, self.num_active).transpose(1, 2)
        real = torch.ones_like(routed[:, :1]) if mask is None else mask[:, None]
        chosen = routed & real
        self.emit("gates", gates)
        self.emit("route", lambda: _route(gates, chosen))
        if self.fillers is not None and self.fillers.shape != chosen.shape:
            raise ValueError(f"fillers: expected shape {tuple(chosen.shape)} (b, h, n), got {tuple(self.fillers.shape)}")
        if self.selection == "batch":
            chosen = chosen | ((self._first_others(chosen, real) if self.fillers is None else self.fillers) & real)
        count = chosen.sum(dim=-1, keepdim=True)
        # A length that depends on the data is none that a graph can have: there all n places are taken, most of them masked.
        static = torch.compiler.is_compiling() or x.is_meta
        length = x.shape[1] if static else max(1, int(count.max()))
        order = (~chosen).to(torch.uint8).argsort(dim=-1, stable=True)[..., :length]
        self.emit("selected", chosen)
        return Selection(gates, chosen, order, torch.arange(length, device=x.device) < count)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Route, attend among the chosen, put back, project."""
        chosen = self.select(x, masks.query)
        q, k, v = self._project(x, chosen)
        heads = self._attend(q, k, v, chosen, x.shape[1])
        self.emit("values", lambda: self._heads(self.v_proj(x)))
        self.emit("mixed", heads)
        self.emit("attention", lambda: self._map(q, k, chosen, x.shape[1]))
        weight = chosen.chosen.to(heads.dtype)
        if self.straight_through:
            gates = chosen.gates.transpose(1, 2).to(heads.dtype)
            weight = weight * (1 + gates - gates.detach())
            heads = heads * (1 + gates - gates.detach()).unsqueeze(-1)
        y = self.out_proj(rearrange(heads, "b h n e -> b n (h e)"))
        return y if self.expert_bias is None else y + weight.transpose(1, 2) @ self.expert_bias

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The maps of the heads, 0 at tokens that they do not take."""
        chosen = self.select(x, masks.query)
        q, k, _ = self._project(x, chosen)
        return self._map(q, k, chosen, x.shape[1])

    def _heads(self, projected: Float[Tensor, "b n i"]) -> Float[Tensor, "b h n d"]:
        per_key = rearrange(projected, "b n (h d) -> b h n d", d=self.head_dim)
        return per_key.repeat_interleave(self.num_heads // per_key.shape[1], dim=1)

    def _project(
        self, x: Float[Tensor, "b n c"], chosen: Selection
    ) -> tuple[Float[Tensor, "b h l d"], Float[Tensor, "b h l d"], Float[Tensor, "b h l d"]]:
        """Queries, keys and values of the chosen tokens, with their ranks as positions."""
        index = chosen.order.unsqueeze(-1).expand(-1, -1, -1, self.head_dim)
        q, k, v = (self._heads(layer(x)).gather(2, index) for layer in (self.q_proj, self.k_proj, self.v_proj))
        rank = torch.arange(q.shape[2], device=x.device)[None]
        return self.position.encode(self.q_norm(q), rank), self.position.encode(self.k_norm(k), rank), v

    def _attend(
        self,
        q: Float[Tensor, "b h l d"],
        k: Float[Tensor, "b h l d"],
        v: Float[Tensor, "b h l e"],
        chosen: Selection,
        n: int,
    ) -> Float[Tensor, "b h n e"]:
        """Among the chosen, and back to their places, exactly 0 elsewhere."""
        batch, length = q.shape[0], q.shape[2]
        bias = self.position.bias(q, length, causal=self.rank_causal, grid=(length,))
        factor = self.position.factor(q, length, causal=self.rank_causal, grid=(length,))
        if bias is None and factor is None:  # heads as examples, so that the mask of each is one of keys alone
            one = [rearrange(part, "b h l d -> (b h) 1 l d") for part in (q, k, v)]
            heads = attention(*one, causal=self.rank_causal, key_mask=chosen.valid.flatten(0, 1))
            heads = rearrange(heads, "(b h) 1 l d -> b h l d", b=batch)
        else:
            pairs = chosen.valid[:, :, None, :].expand(-1, -1, length, -1)
            heads = attention(q, k, v, bias=bias, factor=factor, causal=self.rank_causal, pair_mask=pairs)
        heads = heads.masked_fill(~chosen.valid.unsqueeze(-1), 0.0)
        index = chosen.order.unsqueeze(-1).expand_as(heads)
        return heads.new_zeros(*heads.shape[:2], n, heads.shape[3]).scatter(2, index, heads)

    def _map(
        self, q: Float[Tensor, "b h l d"], k: Float[Tensor, "b h l d"], chosen: Selection, n: int
    ) -> Float[Tensor, "b h n n"]:
        places = torch.eye(n, device=q.device, dtype=q.dtype)[chosen.order]
        return self._attend(q, k, places, chosen, n)

    @staticmethod
    def _first_others(chosen: Bool[Tensor, "b h n"], real: Bool[Tensor, "b 1 n"]) -> Bool[Tensor, "b h n"]:
        """The first real tokens that are not chosen, as many as are missing to the largest choice of the batch."""
        count = chosen.sum(dim=-1, keepdim=True)
        others = real & ~chosen
        return others & (others.cumsum(dim=-1) <= count.max() - count)


def _route(gates: Float[Tensor, "b n h"], routed: Bool[Tensor, "b h n"]) -> Float[Tensor, "b n h"]:
    """The routed gates over their sum in the batch, times the batch size."""
    kept = gates.masked_fill(~routed.transpose(1, 2), 0.0)
    return kept / (kept.sum(dim=0, keepdim=True) + _TINY) * gates.shape[0]
