"""Channel group attention: channels attend to channels, inside groups, over all tokens at once."""

from __future__ import annotations

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


@mixers.register(
    "channel_group",
    family="channel",
    paper="davit",
    supports=Supports(grid=frozenset({1, 2, 3}), permutation_equivariant=True, cost=1.0),
)
class ChannelGroupAttention(Mixer):
    r"""Attention among the channels of a group (Ding et al. 2022, DaViT, equation 3, with the roles of its code).

    For one group of width d with $q, k, v \in \mathbb{R}^{n \times d}$, $a, b$ running over its channels,

    $$A = \mathrm{softmax}_b\!\left(s\,(k^\top v)_{ab}\right) \in \mathbb{R}^{d \times d}, \qquad
      o_{na} = \sum_b A_{ab}\, q_{nb}$$

    Every output sees every token, at O(n d) a channel: time O(n d C), memory O(n C). ``record`` collects
    "channel_attention" (b, groups, d, d); there is no matrix between tokens.

    Args:
        dim: width of the tokens.
        num_heads: groups.
        causal: always False.
        scale: s is $d^{-1/2}$ for "width", or $n^{-1/2}$ over the real tokens for "tokens" (later versions of the authors).
        qkv_bias: biases in the input projection.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=True``; the map sums over all tokens.
        ValueError: for an unknown scale.

    Differs from the paper: which writes softmax(Q^T K) V^T; the authors' k, v, q play Q, K, V, and so they do here.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        scale: str = "width",
        qkv_bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if scale not in ("width", "tokens"):
            raise ValueError(f"scale: expected 'width' or 'tokens', got {scale!r}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scale = scale
        self.in_proj = nn.Linear(dim, 3 * dim, bias=qkv_bias, **place)
        self.out_proj = nn.Linear(dim, dim, **place)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Channels of each group attend to each other; masked tokens are out of the sums."""
        q, k, v = rearrange(self.in_proj(x), "b n (three g d) -> three b g n d", three=3, g=self.num_heads)
        if masks.key is not None:
            k = k.masked_fill(~masks.key[:, None, :, None], 0.0)
        logits = (k.transpose(-1, -2) @ v) * self._scale(x, masks.key, k.shape[-1])
        weights = torch.softmax(logits, dim=-1)
        self.emit("channel_attention", weights)
        return self.out_proj(rearrange(q @ weights.transpose(-1, -2), "b g n d -> b n (g d)"))

    def _scale(self, x: Tensor, mask: Tensor | None, width: int) -> float | Tensor:
        if self.scale == "width":
            return width**-0.5
        if mask is None:
            return x.shape[1] ** -0.5
        return mask.sum(dim=1).clamp(min=1).to(x.dtype).rsqrt()[:, None, None, None]
