"""Attention over fixed feature fields: projections of each field's own, or of all fields at once (Hiformer)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionMixer
from attnlab.mixers.parts.slot_linear import CompositeLinear, SlotLinear
from attnlab.ops.attention import attention


@mixers.register(
    "heterogeneous",
    family="heads",
    paper="hiformer",
    supports=Supports(pair_mask=True, mixing_matrix=True, tokens_option="num_slots", cost=2.0),
    example={"num_slots": 12},
)
class HeterogeneousAttention(Mixer):
    r"""Softmax attention whose q, k, v and o maps are each slot's own (Gui et al. 2023).

    The tokens are L feature fields in a fixed order. For one head of width d and field i with token $e_i$,

    $$q_i = Q_i e_i, \quad k_i = K_i e_i, \quad v_i = V_i e_i, \qquad
      o_i = \sum_j \mathrm{softmax}_j(d^{-1/2}\, e_i^\top Q_i^\top K_j e_j)\, v_j, \qquad y_i = O_i o_i ,$$

    so every ordered pair of fields has a bilinear form of its own. Time O(L^2 c + L c^2), 4 L c^2 parameters.

    Args:
        dim: c, width of the tokens.
        num_heads: heads.
        causal: always False.
        num_slots: L, how many tokens there are.
        bias: biases in all four maps.
        out_proj: whether the heads pass $O_i$; without, they are joined as they are.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a number of tokens other than ``num_slots``, or ``num_slots`` less than 1.

    Differs from the paper: it is built from a description of the method, no authors' code is public. A missing field can be
    masked. $O_i$ starts with deviation 0.02, for a layer that is to start near the residual stream. The feed-forward of each
    field is the channel mixer "slot_mlp".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        causal: bool = False,
        num_slots: int,
        bias: bool = False,
        out_proj: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if num_slots < 1:
            raise ValueError(f"num_slots: expected a positive integer, got {num_slots}")
        self.num_slots = num_slots
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj: nn.Module = SlotLinear(num_slots, dim, dim, bias=bias, **place)
        self.k_proj: nn.Module = SlotLinear(num_slots, dim, dim, bias=bias, **place)
        self.v_proj: nn.Module = SlotLinear(num_slots, dim, dim, bias=bias, **place)
        self.out_proj = SlotLinear(num_slots, dim, dim, bias=bias, **place) if out_proj else None
        if self.out_proj is not None:
            nn.init.normal_(self.out_proj.weight, std=0.02)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Project, attend, project back."""
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        heads = self._attend(q, k, v, masks)
        self.emit("values", v)
        self.emit("mixed", heads)
        self.emit("attention", lambda: self._attend(q, k, AttentionMixer.identity(k), masks))
        y = rearrange(heads, "b h n d -> b n (h d)")
        return y if self.out_proj is None else self.out_proj(y)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The softmax weights."""
        q, k = self._heads(self.q_proj(x)), self._heads(self.k_proj(x))
        return self._attend(q, k, AttentionMixer.identity(k), masks)

    def _heads(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n d"]:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Float[Tensor, "b h n e"]:
        return attention(q, k, v, key_mask=masks.key, pair_mask=masks.pair)


@mixers.register(
    "hiformer",
    family="heads",
    paper="hiformer",
    supports=Supports(mixing_matrix=True, tokens_option="num_slots", cost=2.0),
    example={"num_slots": 12, "rank": 5},
)
class Hiformer(HeterogeneousAttention):
    r"""Heterogeneous attention with keys and values that each read all fields (Gui et al. 2023).

    Of the maps of `HeterogeneousAttention`, those in ``composite`` are replaced by one of the joined fields,

    $$(k_1, \dots, k_L) = (e_1, \dots, e_L)\, W_K, \qquad W_K = L_K R_K^\top \in \mathbb{R}^{Lc \times Lc} ,$$

    of rank r. Time O(L^2 c + L c r) and 2 L c r parameters a composite map; at full rank O(L^2 c^2).

    Args:
        dim: c, width of the tokens.
        num_heads: heads.
        causal: always False.
        num_slots: L, how many tokens there are.
        composite: which maps read all fields, some of "q", "k", "v"; the others are each field's own.
        rank: r, of every composite map; None for full matrices.
        bias: biases in the maps that are each field's own.
        out_proj: whether the heads pass a map of each field's own.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a number of tokens other than ``num_slots``, an unknown letter in ``composite``, or a rank below 1.

    Differs from the paper: it is built from a description of the method. A missing field can be masked; it enters the composite
    maps as zeros. A pair mask is refused, since each composite key holds all fields. ``composite="qkv"`` with ``out_proj=False``
    is a public implementation's reading. That only the queries of task tokens are needed in a last layer is the model's to use.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        causal: bool = False,
        num_slots: int,
        composite: Collection[str] = ("k", "v"),
        rank: int | None = 64,
        bias: bool = False,
        out_proj: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, causal=causal, num_slots=num_slots, bias=bias, out_proj=out_proj, **place)
        if not set(composite) <= set("qkv"):
            raise ValueError(f"composite: expected some of 'q', 'k', 'v', got {composite!r}")
        if rank is not None and rank < 1:
            raise ValueError(f"rank: expected a positive integer or None, got {rank}")
        for kind in sorted(set(composite)):
            setattr(self, f"{kind}_proj", CompositeLinear(num_slots, dim, dim, rank=rank, **place))
