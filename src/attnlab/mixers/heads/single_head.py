"""Single-head attention on a slice of the channels; the others pass by and are projected with it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.parts.conv_bn import ConvBN
from attnlab.mixers.parts.group_norm import group_norm
from attnlab.ops.attention import attention


@mixers.register(
    "single_head",
    family="heads",
    paper="shvit",
    supports=Supports(grid=frozenset({1, 2, 3}), mixing_matrix=True, permutation_equivariant=True, batch_coupled=True, cost=2.0),
    example={"key_dim": 4, "out_scale": 1.0},
)
class SingleHeadAttention(Mixer):
    r"""One head of attention on the first p channels (Yun and Ro 2024, SHViT).

    With $X_1 \in \mathbb{R}^{n \times p}$ the first p channels and $X_2$ the rest, BN being BatchNorm:

    $$[q, k, v] = \mathrm{BN}(W\, \mathrm{GroupNorm}(X_1)), \quad A = \mathrm{softmax}(d_k^{-1/2}\, q k^\top), \quad
      Y = \mathrm{BN}\big(W_o\, \mathrm{ReLU}[A v,\, X_2]\big)$$

    $X_2$ enters the projection as it is. The GroupNorm has one group: its statistics run over all real tokens and p channels of
    an example. Time O(n^2 (d_k + p) + n C^2), memory O(n C). In training BN takes its statistics from all real tokens of the
    batch; `parts.conv_bn.fuse` folds them for evaluation.

    Args:
        dim: width of the tokens.
        num_heads: of the common signature; the mechanism has one head.
        causal: always False.
        attended: p; by default 3/14 of ``dim``, as in the authors' models.
        key_dim: $d_k$.
        out_scale: weight of the last norm at first; the authors begin at 0, with a block that adds nothing.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=True``; the GroupNorm reads all tokens.
        ValueError: for more attended channels than there are, or sizes below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        attended: int | None = None,
        key_dim: int = 16,
        out_scale: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        attended = max(1, 3 * dim // 14) if attended is None else attended
        if not 1 <= attended <= dim:
            raise ValueError(f"attended: expected 1 to dim={dim}, got {attended}")
        if key_dim < 1:
            raise ValueError(f"key_dim: expected at least 1, got {key_dim}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attended, self.key_dim = attended, key_dim
        self.norm = nn.GroupNorm(1, attended, **place)
        self.qkv = ConvBN(attended, 2 * key_dim + attended, rank=1, **place)
        self.out_proj = ConvBN(dim, dim, rank=1, scale=out_scale, **place)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Attend on the slice, join it with the rest, project."""
        q, k, v = self._project(x, masks)
        heads = attention(q, k, v, key_mask=masks.key)
        self.emit("values", v)
        self.emit("mixed", heads)
        self.emit("attention", lambda: self._map(q, k, masks))
        joined = torch.cat((heads[:, 0], x[..., self.attended :]), dim=-1)
        return self.out_proj(torch.relu(joined), (x.shape[1],), masks.query)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The softmax map (b, 1, n, n)."""
        q, k, _ = self._project(x, masks)
        return self._map(q, k, masks)

    def _project(
        self, x: Float[Tensor, "b n c"], masks: Masks
    ) -> tuple[Float[Tensor, "b 1 n d"], Float[Tensor, "b 1 n d"], Float[Tensor, "b 1 n p"]]:
        part = group_norm(x[..., : self.attended], self.norm.weight, self.norm.bias, masks.query)
        qkv = self.qkv(part, (x.shape[1],), masks.query).unsqueeze(1)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.attended], dim=-1)
        return q, k, v

    @staticmethod
    def _map(q: Float[Tensor, "b 1 n d"], k: Float[Tensor, "b 1 n d"], masks: Masks) -> Float[Tensor, "b 1 n n"]:
        identity = torch.eye(k.shape[2], device=k.device, dtype=k.dtype).expand(*k.shape[:2], -1, -1)
        return attention(q, k, identity, key_mask=masks.key)
