"""Injective linear attention: weights normalised by subtraction, and a predicted convolution of the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.linear.core import LinearMixer
from attnlab.mixers.linear.normalizers import Subtract
from attnlab.mixers.parts.predicted_depthwise import PredictedDepthwise

KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "exp": lambda x: (0.2 * x).exp(),
}


@mixers.register(
    "inline",
    family="linear",
    paper="inline-attention",
    supports=Supports(cross=True, grid=frozenset({1, 2}), mixing_matrix=True, cost=1.0),
)
class InlineAttention(LinearMixer):
    r"""InLine attention (Han et al. 2024, Bridging the Divide: Reconsidering Softmax and Linear Attention, section 4).

    With $s = d^{-1/2}$ and c keys, $a_{ij}$ below sum to 1 over j, and different queries have different weights where the keys'
    features span enough; a quotient gives queries of one direction the same.

    $$o_i = \sum_j a_{ij} v_j, \qquad a_{ij} = \frac{s}{c} \phi(q_i)^\top \phi(k_j) +
      \frac{1}{c} \Big(1 - \frac{s}{c} \phi(q_i)^\top \sum_l \phi(k_l)\Big), \qquad y = W_o (o + r)$$

    The local residual r convolves the values with 3 x 3 kernels that are predicted from the mean token, see `PredictedDepthwise`;
    the mixing matrix is a. Time O(n d^2), memory O(n d). A causal form that streams is `linear` with ``normalizer="subtract"``.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        kernel: $\phi$, "identity", "relu", "leaky_relu" or "exp" ($e^{0.2 x}$).
        residual: whether r is there. It adds nothing in cross-attention.
        rank: of the grid on which r's kernels lie, 1 or 2; a sequence is a grid of height 1 for rank 2.
        class_token: the first token is outside the grid: no part of r, but of the mean token and of the attention.
        **options: those of `AttentionMixer`; ``qkv_bias`` is True by default, ``num_kv_heads`` must be all, ``head_dim`` the
            default (r has dim channels), ``position`` "none".

    Raises:
        UnsupportedError: with ``causal=True`` (the mean token is that of all); for a grid of a rank above ``rank``.
        ValueError: for an unknown kernel, another rank, grouped or resized heads, or a position.

    Differs from the paper: the pyramid flavour's reduction of keys and values, 1 by default, is not built.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        kernel: str = "identity",
        residual: bool = True,
        rank: int = 2,
        class_token: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> None:
        given: AttentionOptions = {"qkv_bias": True, **options}
        super().__init__(dim, num_heads, **given)
        if kernel not in KERNELS:
            raise ValueError(f"kernel: expected one of {sorted(KERNELS)}, got {kernel!r}")
        if self.num_heads * self.head_dim != dim:
            raise ValueError(f"head_dim: expected the default {dim // num_heads}, got {self.head_dim}")
        if self.position_name != "none":
            raise ValueError(f"position: expected 'none', got {self.position_name!r}")
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.kernel, self.rank, self.num_prefix = kernel, rank, int(class_token)
        self.normalizer = Subtract(self.head_dim**-0.5)
        self.residual = PredictedDepthwise(dim, num_heads, rank=rank, **place) if residual else None
        self.promise(permutation_equivariant=not residual)

    def features(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """The kernel function."""
        return KERNELS[self.kernel](x)

    def local(
        self, x: Float[Tensor, "b n c"], v: Float[Tensor, "b h n d"], masks: Masks, grid: Grid
    ) -> Float[Tensor, "b h n d"] | None:
        """The convolved values; tokens in front of the grid get nothing."""
        prefix, mask = self.num_prefix, masks.query
        if self.residual is None or v.shape[2] == prefix:
            return None
        tokens = rearrange(v[:, :, prefix:], "b h n d -> b n (h d)")
        kernels = self.residual.kernels(x, mask)
        near = self.residual(kernels, tokens, self.lifted(grid), None if mask is None else mask[:, prefix:])
        return rearrange(F.pad(near, (0, 0, prefix, 0)), "b n (h d) -> b h n d", h=self.num_heads)
