"""Cosine logits with a learned temperature, a query embedding and the log of the key count as their scale."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ScaledCosine(nn.Module):
    r"""Turns queries and keys so that their plain product is a length-scaled cosine (TransNeXt, Shi 2023, section 3.2).

    $$\hat q_i = \left(\frac{q_i}{\lVert q_i\rVert} + e_h\right) \mathrm{softplus}(t_h)\, \ln n_i, \qquad
      \hat k_j = \frac{k_j}{\lVert k_j\rVert}$$

    with a learned embedding $e_h$ and temperature $t_h$ a head, $\mathrm{softplus}(t_h) = 1/0.24$ at first, and $n_i$ the number
    of keys that the query sees.

    Args:
        num_heads: heads.
        head_dim: width of a head.
        query_embedding: whether there is $e_h$.
        length_scale: whether there is $\ln n_i$.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        query_embedding: bool = True,
        length_scale: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.length_scale = length_scale
        start = math.log(math.expm1(1 / 0.24))
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), start, device=device, dtype=dtype))
        self.query_embedding: nn.Parameter | None = None
        if query_embedding:
            self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, head_dim, device=device, dtype=dtype))
            nn.init.trunc_normal_(self.query_embedding, std=0.02)

    def forward(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk m d"], counts: Float[Tensor, "#b #h #n 1"]
    ) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b hk m d"]]:
        """The queries and keys whose product, unscaled, is the logit; ``counts`` is how many keys each query sees."""
        return self.queries(F.normalize(q, dim=-1), counts), F.normalize(k, dim=-1)

    def queries(self, unit: Float[Tensor, "b h n d"], counts: Float[Tensor, "#b #h #n 1"]) -> Float[Tensor, "b h n d"]:
        """The queries from those of length 1."""
        heat = F.softplus(self.temperature)
        if self.length_scale:
            heat = heat * counts.log()
        return (unit if self.query_embedding is None else unit + self.query_embedding) * heat
