"""Linear attention with a positive feature map and a denominator."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.linear.quotient import LINEAR, QuotientAttention
from attnlab.mixers.parts.features import elu_plus_one

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": torch.relu,
    "softplus": F.softplus,
    "exp": torch.exp,
}


@mixers.register("linear", family="linear", supports=LINEAR)
class LinearAttention(QuotientAttention):
    r"""Linear attention (Katharopoulos et al. 2020, equations 5 and 9), feature map $\phi(x) = \mathrm{elu}(x) + 1$ by default.

    $$o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}$$

    over all j, or over j <= i where causal. Time O(n d^2), memory O(n d): chunks, no n x n map. State: ``sum`` (b, h, d, d + 1),
    the outer products with a column of ones for the denominator.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        feature_map: "elu", "relu", "softplus" or "exp".
        **options: those of `AttentionMixer`; ``num_kv_heads`` must be all and ``position`` "none".

    Raises:
        ValueError: for an unknown feature map, grouped keys, or a position.

    Differs from the paper: queries whose denominator is 0 (no key, or "relu" with nothing in common) give exactly 0.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, feature_map: str = "elu", **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: expected one of {sorted(FEATURE_MAPS)}, got {feature_map!r}")
        if self.position_name != "none":
            raise ValueError(
                f"position: expected 'none' (a rotation can make the denominator vanish), got {self.position_name!r}"
            )
        self.feature_map = feature_map

    def features(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """The feature map, channel by channel."""
        return FEATURE_MAPS[self.feature_map](x)
