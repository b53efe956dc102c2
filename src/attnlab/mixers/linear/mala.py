"""Magnitude-aware linear attention: the length of a query's features sharpens its weights."""

from __future__ import annotations

from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.info import Supports
from attnlab.mixers.linear.gated_grid import GatedGridLinear, GatedGridOptions
from attnlab.mixers.linear.normalizers import Magnitude


@mixers.register(
    "mala",
    family="linear",
    paper="mala",
    supports=Supports(grid=frozenset({1, 2}), mixing_matrix=True, cost=1.0),
)
class MagnitudeAwareLinearAttention(GatedGridLinear):
    r"""Magnitude-aware linear attention (Fan et al. 2025, Rectifying Magnitude Neglect in Linear Attention).

    With $\phi = \mathrm{elu} + 1$, s = d^{-1/2}, c keys and $z_i = \frac{s}{c} \phi(q_i)^\top \sum_j \phi(k_j)$,

    $$o_i = \Big(1 + \frac{1}{z_i + \epsilon}\Big) \frac{s}{c} \sum_j \big(R\phi(q_i)\big)^\top \big(R\phi(k_j)\big)\, v_j
      - z_i \frac{1}{c} \sum_j v_j, \qquad y = W_o \big((o + \mathrm{DWConv}_5(v)) \odot W_g x\big)$$

    with rotations R by the place on the grid, $\epsilon = 10^{-6}$. Without them a query's weights sum to 1; some are negative.
    Scaling $\phi(q_i)$ by t scales the differences of its weights by more than a constant: plain linear attention forgets t.
    Time O(n d^2), memory O(n d). A causal form that streams is `linear` with ``normalizer="magnitude"``.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        eps: $\epsilon$.
        rank: of the grid on which rotation and convolution lie, 1 to 3; a grid of a lower rank is one whose first sides are 1.
        rotary: R; with it there is no cross-attention.
        local_kernel: side of the depthwise convolution; 0 for none. It adds nothing in cross-attention.
        gate: whether $W_g$ is there.
        **options: those of `AttentionMixer`; ``qkv_bias`` is True by default, ``num_kv_heads`` must be all, ``position`` "none".

    Raises:
        UnsupportedError: with ``causal=True``; for ``context`` with ``rotary``.
        ValueError: see `GatedGridLinear`.

    Differs from the paper: which writes the factors without s; this is its code's form. Its models have softmax attention in
    their last two stages.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, eps: float = 1e-6, **options: Unpack[GatedGridOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        self.normalizer = Magnitude(self.head_dim**-0.5, eps)
        self.promise(cross=True, permutation_equivariant=self.lepe is None)
