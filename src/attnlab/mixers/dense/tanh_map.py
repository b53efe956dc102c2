"""Attention without a normaliser: tanh scores plus a learned map, on the tokens themselves as values."""

from __future__ import annotations

import math
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
from attnlab.mixers.parts.conv_bn import ConvBN
from attnlab.ops.attention import attention
from attnlab.ops.backends import accumulate_dtype


@mixers.register(
    "tanh_map",
    family="dense",
    paper="ista-net",
    supports=Supports(mixing_matrix=True, batch_coupled=True, tokens_option="num_tokens", cost=2.0),
    example={"num_tokens": 12, "inner": 2, "kernel_size": 3},
)
class TanhMapAttention(Mixer):
    r"""Interactive token attention (Wen et al. 2023, ISTA-Net): scores of both signs and a dense map, no softmax.

    A token is a window of P positions of C channels, $x_i \in \mathbb{R}^{P \times C}$, one of U. For head h,

    $$A_{ij} = \alpha_h \tanh\Big(\frac{1}{d P} \sum_{p} q_{ip}^\top k_{jp}\Big) + M_{h,ij}, \qquad
      o_i = \sum_j A_{ij} x_j ,$$

    with $q_{ip} = W_q (x_{ip} + e_i)$ and $k_{jp} = W_k (x_{jp} + e_j)$ of width d, sinusoids $e$ of the token's index, learned
    $\alpha$ (1 at first) and $M \in \mathbb{R}^{h \times U \times U}$ (1 / U at first). The values are the tokens as they are,
    in every head; y is a convolution over the token axis from h C channels to C, and BatchNorm. Time O(h U^2 P C), memory
    O(h U^2).

    Args:
        dim: P C, width of the tokens; position after position.
        num_heads: heads, unless ``num_maps`` says otherwise.
        causal: always False.
        num_tokens: U, how many tokens there are.
        inner: P, positions in a token, a divisor of ``dim``.
        num_maps: heads, which need not divide ``dim``, for each reads whole tokens; by default ``num_heads``.
        qk_dim: d; by default C / 4.
        kernel_size: odd width of the convolution over tokens.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an ``inner`` that does not divide ``dim``, other sizes below 1, or an even kernel.

    Differs from the paper: a row of A is the token that receives, where the authors index the source first. Tokens can be masked:
    they are in no map, convolution or statistic. Dropout of the map, residuals, activations and the two layers that follow are
    the block's. The convolution and the norm are part of the mixer since heads of whole tokens need a way back to ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        num_tokens: int,
        inner: int = 1,
        num_maps: int | None = None,
        qk_dim: int | None = None,
        kernel_size: int = 5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        maps = num_heads if num_maps is None else num_maps
        for name, value in (("num_tokens", num_tokens), ("inner", inner), ("num_maps", maps), ("qk_dim", qk_dim or 1)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        if dim % inner:
            raise ValueError(f"inner: expected a divisor of dim={dim}, got {inner}")
        self.num_tokens, self.inner, self.num_heads = num_tokens, inner, maps
        width = dim // inner
        self.qk_dim = max(1, width // 4) if qk_dim is None else qk_dim
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(width, maps * self.qk_dim, **place)
        self.k_proj = nn.Linear(width, maps * self.qk_dim, **place)
        self.alpha = nn.Parameter(torch.ones(maps, 1, 1, **place))
        self.token_map = nn.Parameter(torch.full((maps, num_tokens, num_tokens), 1.0 / num_tokens, **place))
        self.out_proj = ConvBN(maps * width, width, kernel_size, rank=1, bias=True, **place)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n e"]:
        """Two maps on the tokens, and the convolution over them."""
        q, k = self._project(x)
        v = x.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        heads = self._attend(q, k, v, masks)
        self.emit("values", v)
        self.emit("mixed", heads)
        self.emit("attention", lambda: self._attend(q, k, AttentionMixer.identity(k), masks))
        sequences = rearrange(heads, "b h n (p c) -> (b p) n (h c)", p=self.inner)
        mask = None if masks.query is None else masks.query.repeat_interleave(self.inner, dim=0)
        y = self.out_proj(sequences, (self.num_tokens,), mask)
        return rearrange(y, "(b p) n c -> b n (p c)", p=self.inner)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The sum of both maps."""
        q, k = self._project(x)
        return self._attend(q, k, AttentionMixer.identity(k), masks)

    def _project(self, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
        placed = x.unflatten(-1, (self.inner, -1))
        placed = placed + _sinusoids(self.num_tokens, placed).unsqueeze(1)
        q, k = (rearrange(f(placed), "b n p (h d) -> b h n (p d)", h=self.num_heads) for f in (self.q_proj, self.k_proj))
        return q, k

    def _attend(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"], masks: Masks
    ) -> Float[Tensor, "b h n e"]:
        scale, alpha = 1.0 / q.shape[-1], self.alpha.unsqueeze(0)
        scored = attention(q, k, v, scale=scale, factor=alpha, key_mask=masks.key, normalizer="tanh")
        if masks.key is not None:
            v = v.masked_fill(~masks.key[:, None, :, None], 0.0)
        return scored + self.token_map.to(v.dtype) @ v


def _sinusoids(num_tokens: int, like: Float[Tensor, "b n p c"]) -> Float[Tensor, "n c"]:
    """Sine and cosine of the index in turn, wavelengths from 2 pi to 20000 pi (Vaswani et al. 2017, section 3.5)."""
    width, wide = like.shape[-1], accumulate_dtype(like.dtype)
    rates = torch.exp(torch.arange(0, width, 2, device=like.device, dtype=wide) * (-math.log(10000.0) / width))
    angles = torch.arange(num_tokens, device=like.device, dtype=wide).unsqueeze(-1) * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[:, :width].to(like.dtype)
