"""Linear attention whose denominator is learned from the query's token."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.linear.core import LINEAR, LinearMixer
from attnlab.mixers.linear.normalizers import Normalizer
from attnlab.mixers.parts.features import feature_map as named_map

ETAS: dict[str, Callable[[Tensor], Tensor]] = {"exp": torch.exp, "softplus": F.softplus, "sigmoid": torch.sigmoid}


@mixers.register("normalized_linear", family="linear", paper="dsf", supports=LINEAR)
class NormalizedLinearAttention(LinearMixer):
    r"""Normalised linear attention (Sieber et al. 2024, Understanding the differences in Foundation Models).

    $$o_i = \frac{1}{\eta(u_i)}\, \phi(q_i)^\top \sum_j \phi(k_j) v_j^\top, \qquad \eta(u) = \mathrm{act}(W_\eta u + b)$$

    over all j, or over j <= i where causal: the denominator of `linear` depends on query and keys, this one on the token $u_i$
    alone, one number a head. So the paper's recurrence is exact,

    $$h_i = \frac{\eta_{i-1}}{\eta_i} h_{i-1} + \frac{1}{\eta_i} \phi(k_i) v_i^\top .$$

    Time O(n d^2), memory O(n d). State: ``sum`` (b, h, d, d + 1), without the factor $1 / \eta$; `dynamics` too has it in the
    output, where it is the same and multiplies by no earlier $\eta$.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        eta: act, "exp", "softplus" or "sigmoid".
        feature_map: as in `linear`, random features apart.
        **options: those of `AttentionMixer`; ``num_kv_heads`` must be all, ``position`` one in queries and keys such as "rotary".

    Raises:
        ValueError: for an unknown ``eta`` or feature map, grouped keys, or a position that acts on logits, weights or values.

    Differs from the paper: written from memory of it, with a bias in $\eta$, and a form that is not causal.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        eta: str = "exp",
        feature_map: str = "elu",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(dim, num_heads, normalizer=Normalizer(), **options)
        if eta not in ETAS:
            raise ValueError(f"eta: expected one of {sorted(ETAS)}, got {eta!r}")
        self.eta, self.feature_map = eta, named_map(feature_map)
        self.eta_proj = nn.Linear(dim, num_heads, device=options.get("device"), dtype=options.get("dtype"))

    def features(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """The feature map."""
        return self.feature_map(x)

    def weigh_outputs(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n 1"]:
        r"""$1 / \eta$."""
        return ETAS[self.eta](self.eta_proj(x)).reciprocal().transpose(1, 2).unsqueeze(-1)
