"""Window attention: softmax attention inside each window of a grid."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.windows import Windows
from attnlab.mixers.attention import AttentionMixer, AttentionOptions
from attnlab.ops.attention import attention


@mixers.register(
    "window",
    family="local",
    supports=Supports(grid=frozenset({1, 2, 3}), mixing_matrix=True, cost=1.0),
    example={"window": 3},
)
class WindowAttention(AttentionMixer):
    r"""Softmax attention among the tokens of each window (Liu et al. 2021, section 3.2, unshifted; DaViT's spatial attention).

    The grid is cut into windows of ``window`` cells a side and each attends to itself. Time O(n w^r d) on a grid of rank r.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        window: side of a window in cells.
        border: what cells outside the grid are where the side is no multiple: "masked", or "zero_tokens" (DaViT's code: zero
            inputs, which take part in the softmax; `mixing_matrix` shows the masked form).
        **options: those of `AttentionMixer`; ``position`` must be "none".

    Raises:
        ValueError: for a window below 1, an unknown border, or a position.
        UnsupportedError: with ``causal=True``.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, window: int = 7, border: str = "masked", **options: Unpack[AttentionOptions]
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        if border not in ("masked", "zero_tokens"):
            raise ValueError(f"border: expected 'masked' or 'zero_tokens', got {border!r}")
        if self.position_name != "none":
            raise ValueError(f"position: expected 'none', got {self.position_name!r}")
        self.window, self.border = window, border

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m e"],
        masks: Masks,
        grid: Grid | None,
    ) -> Float[Tensor, "b h n e"]:
        """Softmax inside each window."""
        grid = grid or (q.shape[2],)
        windows = self._windows(grid)
        real = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if masks.key is None else masks.key
        allowed = windows.split(real.unsqueeze(-1)).flatten(0, 1).squeeze(-1)
        q, k, v = (
            rearrange(windows.split(rearrange(t, "b h n d -> b n (h d)")), "b w s (h d) -> (b w) h s d", h=t.shape[1])
            for t in (q, k, v)
        )
        out = rearrange(attention(q, k, v, key_mask=allowed), "(b w) h s d -> b w s (h d)", b=real.shape[0])
        return rearrange(windows.merge(out), "b n (h d) -> b h n d", h=self.num_heads)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Project, attend inside windows, project back."""
        windows = self._windows(grid)
        if self.border == "zero_tokens":
            real = torch.ones_like(x[..., 0], dtype=torch.bool) if masks.query is None else masks.query
            real = windows.pad(real.unsqueeze(-1), value=True).squeeze(-1)
            masks = Masks(real, real)
            x, grid = windows.pad(x), windows.padded
        y = super().mix(x, None, masks, grid)
        return windows.crop(y) if self.border == "zero_tokens" else y

    def _windows(self, grid: Grid) -> Windows:
        return Windows(grid, (self.window,) * len(grid))
