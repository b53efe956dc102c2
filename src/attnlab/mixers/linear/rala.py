"""Rank-augmented linear attention: keys weighed by the mean query, outputs gated by the input."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.linear.gated_grid import GatedGridLinear, GatedGridOptions
from attnlab.mixers.linear.normalizers import DivideMeans


@mixers.register(
    "rala",
    family="linear",
    paper="rala",
    supports=Supports(grid=frozenset({1, 2}), mixing_matrix=True, cost=1.0),
)
class RankAugmentedLinearAttention(GatedGridLinear):
    r"""Rank-augmented linear attention (Fan et al. 2024, Breaking the Low-Rank Dilemma of Linear Attention).

    With $\phi = \mathrm{elu} + 1$ and the mean query $\bar q = \frac{1}{n} \sum_i \phi(q_i)$,

    $$\alpha = n\,\mathrm{softmax}_j\big(d^{-1/2} \phi(k_j)^\top \bar q\big), \qquad k'_j = \alpha_j\, \phi(k_j)$$

    $$o_i = \frac{\frac{1}{n} \sum_j (R\phi(q_i))^\top (R k'_j)\, v_j}{\frac{1}{n} \phi(q_i)^\top \sum_j k'_j + \epsilon}, \qquad
      y = W_o \big((o + \mathrm{DWConv}_5(v)) \odot W_g x\big)$$

    with rotations R by the place on the grid, $\epsilon = 10^{-6}$. The weights $\alpha$ raise the rank of the sum of outer
    products, the gate that of the output. Time O(n d^2), memory O(n d). ``record`` collects "token_weights" (b, h, n).

    Args:
        dim: width of the tokens.
        num_heads: heads.
        eps: $\epsilon$.
        augment: whether $\alpha$ is there; otherwise it is 1.
        rank: of the grid on which rotation and convolution lie, 1 to 3; a grid of a lower rank is one whose first sides are 1.
        rotary: R.
        local_kernel: side of the depthwise convolution; 0 for none.
        gate: whether $W_g$ is there.
        **options: those of `AttentionMixer`; ``qkv_bias`` is True by default, ``num_kv_heads`` must be all, ``position`` "none".

    Raises:
        UnsupportedError: with ``causal=True`` (the mean query is that of all tokens).
        ValueError: see `GatedGridLinear`.

    Differs from the paper: the means and $\alpha$ are those of real tokens. Its models have softmax attention in their last two
    stages.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        eps: float = 1e-6,
        augment: bool = True,
        **options: Unpack[GatedGridOptions],
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.normalizer, self.augment = DivideMeans(eps), augment

    def weigh_keys(self, q: Float[Tensor, "b h n w"], k: Float[Tensor, "b h m w"], masks: Masks) -> Float[Tensor, "b h m w"]:
        r"""$\alpha_j \phi(k_j)$."""
        if not self.augment:
            return k
        number: int | Tensor = q.shape[2]
        if masks.query is not None:
            q = q.masked_fill(~masks.query[:, None, :, None], 0.0)
            number = masks.query.sum(dim=1).clamp(min=1)[:, None, None, None]
        mean = q.sum(dim=2, keepdim=True) / number
        logits = k @ mean.mT * self.head_dim**-0.5
        if masks.key is not None:
            # The least finite number, and no infinity: without any real token the weights are of no account, but not NaN.
            logits = logits.masked_fill(~masks.key[:, None, :, None], torch.finfo(logits.dtype).min)
        weights = logits.softmax(dim=2) * number
        self.emit("token_weights", weights.squeeze(-1))
        return k * weights
