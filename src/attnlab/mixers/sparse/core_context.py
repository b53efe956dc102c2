"""Core context aware attention: far groups of tokens pooled to one token each, near tokens exact, in one softmax."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.state import State
from attnlab.mixers.attention import CachedAttention
from attnlab.mixers.parts.causal_options import CausalOptions
from attnlab.mixers.sparse.core_tokens import Cores, Exact, Reach


@mixers.register(
    "core_context_aware",
    family="sparse",
    paper="core-context-aware-attention",
    supports=Supports(causal="always", streaming=True, mixing_matrix=True, state="grows", cost=2.0),
    example={"group": 2, "window": 3},
)
class CoreContextAwareAttention(CachedAttention):
    r"""Attention to pooled groups far back and to single tokens nearby (Chen et al. 2024, arXiv 2412.12465).

    Group a holds the g tokens $I_a = \{a g, \dots, a g + g - 1\}$. Its core token, a head, is weighed by the query of its last
    token l:

    $$w_a = \mathrm{softmax}_{j \in I_a}(d^{-1/2}\, q_l^\top k_j), \qquad
      k^G_a = \sum_{j \in I_a} w_{aj} k_j, \qquad v^G_a = \sum_{j \in I_a} w_{aj} v_j$$

    which are the projections of the mean of the inputs with the same weights. Query i uses the first
    $j_i = \max(0, \lfloor (i + 1 - s) / g \rfloor)$ cores and the tokens from $j_i g$ on, s to s + g - 1 of them:

    $$o_i = \mathrm{softmax}\big(d^{-1/2}\, q_i^\top [k^G_0 \dots k^G_{j_i - 1};\ k_{j_i g} \dots k_i]\big)\,
            [v^G_0 \dots v^G_{j_i - 1};\ v_{j_i g} \dots v_i]$$

    It has no parameters beyond those of softmax attention, and equals it for g = 1, and for up to s tokens. Time
    O(n (n / g + s) d), memory O(n d); the state holds n / g cores and s + g tokens.

    Args:
        dim: width of the tokens.
        num_heads: heads; each pools with its own weights.
        group: g, tokens of a core; may be changed later, and so may ``window``.
        window: s, exact tokens that every query has at least.
        overlap: use the last token of the last pooled group exactly too, as the indices are printed in the paper.
        pool_rotated: pool keys as they stand, each turned to its own position; by default each is turned to that of its group's
            last token first, where the core then stands.
        causal: always True.
        **options: those of `AttentionMixer`; ``position`` may be "none" or "rotary".

    Raises:
        ValueError: for a group or window below 1, or a position that is a bias.
        UnsupportedError: with ``causal=False``.

    Differs from the paper: its position of a core is not stated, and ours; masked tokens keep their places in the groups (pad on
    the right), take no part in the pooling, and the last real token of a group weighs it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        group: int = 16,
        window: int = 1024,
        overlap: bool = False,
        pool_rotated: bool = False,
        causal: bool = True,
        **options: Unpack[CausalOptions],
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, **options)
        for name, value in (("group", group), ("window", window)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.position_name not in ("none", "rotary"):
            raise ValueError(f"position: expected 'none' or 'rotary', got {self.position_name!r}; a core has no bias")
        self.group, self.window, self.overlap, self.pool_rotated = group, window, overlap, pool_rotated

    @property
    def reach(self) -> Reach:
        """Which cores and tokens a query uses."""
        return Reach(self.group, self.window, self.overlap)

    def pool(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk n d"],
        v: Float[Tensor, "b hk n e"],
        real: Bool[Tensor, "b n"] | None,
    ) -> Cores:
        """The cores of the complete groups of these tokens."""
        return self.reach.pool(q, k, v, real, None if self.pool_rotated or self.position_name == "none" else self.position)

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """A whole sequence: pool it, then one softmax over cores and tokens."""
        return self.reach.attend(q, Exact(k, v, masks.key, 0), self.pool(q, k, v, masks.key))

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """No cores, no tokens. ``tail`` are the queries of a group that is not complete yet."""
        empty = torch.zeros(batch_size, self.num_heads, 0, self.head_dim, device=device, dtype=dtype)
        nobody = torch.ones(batch_size, 0, device=device, dtype=torch.bool)
        cores = {"core_k": empty, "core_v": empty.clone(), "core_real": nobody, "tail": empty.clone()}
        return super().begin(batch_size, device, dtype).replace(**cores)

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Pool the groups that the piece completes, attend, and forget what lies before the next query's window."""
        b, n = x.shape[:2]
        q, k, v = self.project(x, index=self._index(x, state, mask))
        pooled = state["core_k"].shape[2] * self.group
        seen = pooled + state["tail"].shape[2]
        base = seen - state["k"].shape[2]
        k, v = torch.cat((state["k"], k), 2), torch.cat((state["v"], v), 2)
        real = torch.cat((state["real"], k.new_ones(b, n, dtype=torch.bool) if mask is None else mask), 1)
        tail, later = torch.cat((state["tail"], q), 2), slice(pooled - base, None)
        new = self.pool(tail, k[:, :, later], v[:, :, later], real[:, later])
        state = state.grow(2, core_k=new.k, core_v=new.v)
        state = state.replace(core_real=torch.cat((state["core_real"], new.real), 1))
        cores = Cores(state["core_k"], state["core_v"], state["core_real"])
        heads = self.reach.attend(q, Exact(k, v, real, base), cores)
        start = self.reach.first_exact(seen + n) - base
        # Contiguous copies: a view would keep the whole history alive.
        kept = {"k": k[:, :, start:].clone(), "v": v[:, :, start:].clone(), "real": real[:, start:].clone()}
        kept["tail"] = tail[:, :, new.k.shape[2] * self.group :].clone()
        return self.join(heads, x, mask), state.replace(**kept, position=state["position"] + n)
