"""Linear attention as RAVLT and MAViT have it: rotary features, a depthwise convolution of the values, an output gate."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.grid import Grid
from attnlab.core.masks import Masks
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.linear.core import LinearMixer
from attnlab.mixers.linear.normalizers import Normalizer
from attnlab.mixers.parts.features import elu_plus_one
from attnlab.mixers.parts.grid_rotary import GridRotary
from attnlab.positions.lepe import LocallyEnhancedPosition


class GatedGridOptions(AttentionOptions, total=False):
    """The options of `GatedGridLinear` that a subclass hands on unchanged."""

    rank: int
    rotary: bool
    local_kernel: int
    gate: bool


class GatedGridLinear(LinearMixer):
    r"""$y = W_o\big((\mathrm{linear}(q, k, v) + \mathrm{DWConv}(v)) \odot W_g x\big)$ with $\phi(x) = \mathrm{elu}(x) + 1$.

    Rotary position turns the features of the products; those of the normaliser stay as they are.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        normalizer: what becomes of the sums.
        rank: of the grid on which rotation and convolution lie, 1 to 3; a grid of a lower rank is one whose first sides are 1.
        rotary: whether features are turned, see `GridRotary`; self-attention alone.
        local_kernel: odd side of the depthwise convolution, with bias; 0 for none. It adds nothing in cross-attention.
        gate: whether $W_g$ is there (with bias where ``qkv_bias``), without activation.
        **options: those of `AttentionMixer`; ``qkv_bias`` is True by default, ``num_kv_heads`` must be all, ``position`` "none".

    Raises:
        ValueError: for a rank or kernel out of range, a head width that the axes of the grid cannot share, grouped keys, or a
            position.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        normalizer: Normalizer | None = None,
        rank: int = 2,
        rotary: bool = True,
        local_kernel: int = 5,
        gate: bool = True,
        **options: Unpack[AttentionOptions],
    ) -> None:
        given: AttentionOptions = {"qkv_bias": True, **options}
        super().__init__(dim, num_heads, normalizer=normalizer, **given)
        if rank not in (1, 2, 3):
            raise ValueError(f"rank: expected 1, 2 or 3, got {rank}")
        if self.position_name != "none":
            raise ValueError(f"position: expected 'none' (rotary= turns the features), got {self.position_name!r}")
        if local_kernel < 0 or (local_kernel and local_kernel % 2 == 0):
            raise ValueError(f"local_kernel: expected an odd number, or 0 for none, got {local_kernel}")
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        inner = num_heads * self.head_dim
        self.rank, self.turns = rank, rotary
        self.rotary = GridRotary(self.head_dim, rank=rank) if rotary else None
        self.gate_proj = nn.Linear(dim, inner, bias=given["qkv_bias"], **place) if gate else None
        self.lepe = None
        if local_kernel:
            self.lepe = LocallyEnhancedPosition(num_heads, self.head_dim, kernel_size=local_kernel, rank=rank).to(**place)
        self.promise(permutation_equivariant=self.lepe is None)

    def features(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        """elu + 1."""
        return elu_plus_one(x)

    def turn(self, x: Float[Tensor, "b h n w"], index: Int[Tensor, "#b n"] | None, grid: Grid | None) -> Float[Tensor, "b h n w"]:
        """Features turned by their cells."""
        return x if self.rotary is None else self.rotary(x, self.lifted((x.shape[2],) if grid is None else grid))

    def local(
        self, x: Float[Tensor, "b n c"], v: Float[Tensor, "b h n d"], masks: Masks, grid: Grid
    ) -> Float[Tensor, "b h n d"] | None:
        """The convolved values."""
        return None if self.lepe is None else self.lepe.local(v, self.lifted(grid), masks.key)

    def weigh_heads(
        self, heads: Float[Tensor, "b h n e"], x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
    ) -> Float[Tensor, "b h n e"]:
        """The gate."""
        if self.gate_proj is None:
            return heads
        return heads * rearrange(self.gate_proj(x), "b n (h e) -> b h n e", h=self.num_heads)
