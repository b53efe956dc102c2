"""L2ViT's linear attention: ReLU features, a clamped denominator, a temperature for each head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.linear.core import LINEAR, LinearMixer
from attnlab.mixers.linear.normalizers import Clamp


@mixers.register("enhanced_linear", family="linear", paper="l2vit", supports=LINEAR)
class EnhancedLinearAttention(LinearMixer):
    r"""Linear attention of L2ViT (Zheng 2025, The Linear Attention Resurrection in Vision Transformer).

    $$o_i = \frac{\tau_h\, \phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\max(\phi(q_i)^\top \sum_j \phi(k_j),\, m)}, \qquad
      \phi(x) = \max(x, 0)$$

    over all j, or over j <= i where causal. Time O(n d^2), memory O(n d). With few tokens the clamp is active throughout and
    the output a plain sum over m. The paper's other half, the local concentration module that follows it in a block, is
    `local_concentration`. State: ``sum`` (b, h, d, d + 1).

    Args:
        dim: width of the tokens.
        num_heads: heads.
        denominator_min: m.
        **options: those of `AttentionMixer`; ``qkv_bias`` is True by default, ``num_kv_heads`` must be all, ``position`` "none".

    Raises:
        ValueError: for a minimum that is not positive, grouped keys, or a position.

    Differs from the paper: a causal form, cross-attention, and masks.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, denominator_min: float | int = 100.0, **options: Unpack[AttentionOptions]
    ) -> None:
        given: AttentionOptions = {"qkv_bias": True, **options}
        super().__init__(dim, num_heads, **given)
        if self.position_name != "none":
            raise ValueError(f"position: expected 'none', got {self.position_name!r}")
        self.normalizer = Clamp(
            float(denominator_min),
            num_heads=num_heads,
            temperature=self.head_dim**-0.5,
            device=options.get("device"),
            dtype=options.get("dtype"),
        )

    def features(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """The positive part."""
        return torch.relu(x)
