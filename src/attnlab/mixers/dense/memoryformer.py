"""MemoryFormer's attention: queries, keys and values looked up in tables instead of projected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.mixers.attention import DENSE
from attnlab.mixers.dense.softmax import SoftmaxAttention
from attnlab.mixers.parts.lookup_linear import LookupLinear, lookup_addresses


@mixers.register(
    "memoryformer",
    family="dense",
    paper="memoryformer",
    supports=replace(DENSE, cross=False, permutation_equivariant=False, discontinuous=True),
    example={"tau": 4},
)
class MemoryFormerAttention(SoftmaxAttention):
    r"""Softmax attention without a linear layer (Ding et al. 2024, MemoryFormer; equations as the authors' code has them).

    With the rows $a_k$ and weights $w_k$ of the chunks of a token, computed once (`lookup_addresses`), and three `LookupLinear`
    layers that share them,

    $$q = \sum_k w_k T^q_k[a_k] + b^q, \quad k, v \text{ likewise}, \qquad
      o_i = \sum_j \mathrm{softmax}_j(d^{-1/2} q_i^\top k_j)\, v_j$$

    Heads are concatenated; there is no output projection. A quarter of each head's channels is turned by rotary positions. Time
    O(n dim^2 / tau + n^2 dim). Parameters 3 (2^tau dim^2 / tau + dim). The state holds all keys and values.

    Args:
        dim: width of the tokens, a multiple of ``tau``.
        num_heads: heads.
        causal: see `Mixer`.
        tau: width of a chunk.
        weight: "l1_prob" (the authors' code) or "prob" (the paper), see `lookup_addresses`.
        position: name of a registered position.
        position_options: the position's own options; None is for "rotary" a fraction of 0.25, or one pair in narrower heads.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if ``tau`` does not divide ``dim``, for an unknown weight, or heads of one channel with "rotary".

    Differs from the paper: without the linear layer that the authors' code can put before the signs, which no released
    configuration has. ``context`` is refused, as two sequences have no common rotary positions.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        tau: int = 8,
        weight: str = "l1_prob",
        position: str = "rotary",
        position_options: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if position == "rotary" and position_options is None:
            position_options = {"fraction": max(0.25, min(1.0, 2.0 * num_heads / max(dim, 1)))}
        super().__init__(dim, num_heads, causal=causal, position=position, position_options=position_options, **place)
        del self.q_proj, self.k_proj, self.v_proj
        self.q_lookup = LookupLinear(dim, dim, tau=tau, weight=weight, **place)
        self.k_lookup = LookupLinear(dim, dim, tau=tau, weight=weight, **place)
        self.v_lookup = LookupLinear(dim, dim, tau=tau, weight=weight, **place)
        self.out_proj = nn.Identity()  # type: ignore[assignment]

    def project(
        self, x: Float[Tensor, "b n c"], context: Tensor | None = None, index: Int[Tensor, "#b n"] | None = None
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b hk m d"], Float[Tensor, "b hk m d"]]:
        """Queries, keys and values from one computation of the addresses, with positions in queries and keys."""
        addresses = lookup_addresses(x, self.q_lookup.tau, self.q_lookup.weight)
        layers = (self.q_lookup, self.k_lookup, self.v_lookup)
        q, k, v = (rearrange(layer.read(*addresses), "b n (h d) -> b h n d", h=self.num_heads) for layer in layers)
        index = torch.arange(x.shape[1], device=x.device)[None] if index is None else index
        return self.position.encode(q, index), self.position.encode(k, index), v
