"""Cascaded group attention: each head reads its own channels, plus what the head before it found."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.windows import Windows
from attnlab.mixers.parts.conv_bn import ConvBN
from attnlab.ops.attention import attention
from attnlab.positions.absolute_offsets import AbsoluteOffsets


@mixers.register(
    "cascaded_group",
    family="heads",
    paper="efficientvit-cga",
    supports=Supports(grid=frozenset({1, 2}), mixing_matrix=True, batch_coupled=True, cost=1.0),
    example={"window": 3, "key_dim": 4, "kernels": 3, "out_scale": 1.0},
)
class CascadedGroupAttention(Mixer):
    r"""Heads on slices of the channels, in a cascade (Liu et al. 2023, EfficientViT).

    $X_1, \dots, X_h$ are the slices of $C/h$ channels, and for head i inside each window, all norms being BatchNorm:

    $$F_i = X_i + O_{i-1}, \quad [q, k, v] = \mathrm{ConvBN}_1(F_i), \quad q \leftarrow \mathrm{DWConvBN}_{s_i}(q)$$
    $$O_i = \mathrm{softmax}(d_k^{-1/2}\, q k^\top + b_i)\, v, \quad
      Y = \mathrm{ConvBN}_1(\mathrm{ReLU}[O_1, \dots, O_h])$$

    with $O_0 = 0$ and a learned bias $b_i$ by absolute offset. Values have $C/h$ channels, so that a head's output can be
    added to the next slice; heads run one after the other by definition. Time O(n w^2 C), memory O(n w^2). In training
    the norms take their statistics from all real tokens of the batch; `parts.conv_bn.fuse` folds them for evaluation.

    Args:
        dim: width of the tokens.
        num_heads: h.
        causal: always False.
        key_dim: $d_k$.
        kernels: $s_i$, odd, one for all heads or one each.
        window: side of a window; a sequence is a grid of height 1.
        border: what cells outside the grid are where its sides are no multiples of the window: "masked", or "zero_tokens" (the
            authors' code: zero inputs, which are keys and in the statistics; `mixing_matrix` shows the masked form).
        out_scale: weight of the last norm at first; the authors begin at 0, with a block that adds nothing.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=True``; for a grid of rank 3.
        ValueError: for an even kernel, another number of kernels than heads, an unknown border, or sizes below 1.

    Differs from the paper: cells outside the grid are masked by default.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        causal: bool = False,
        key_dim: int = 16,
        kernels: int | tuple[int, ...] = 5,
        window: int = 7,
        border: str = "masked",
        out_scale: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        sides = (kernels,) * num_heads if isinstance(kernels, int) else tuple(kernels)
        if len(sides) != num_heads:
            raise ValueError(f"kernels: expected one for each of num_heads={num_heads}, got {kernels}")
        if key_dim < 1 or window < 1:
            raise ValueError(f"key_dim, window: expected at least 1, got {key_dim} and {window}")
        if border not in ("masked", "zero_tokens"):
            raise ValueError(f"border: expected 'masked' or 'zero_tokens', got {border!r}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.key_dim, self.value_dim = key_dim, dim // num_heads
        self.window, self.border = window, border
        width = self.value_dim
        self.qkvs = nn.ModuleList([ConvBN(width, 2 * key_dim + width, **place) for _ in sides])
        self.q_convs = nn.ModuleList([ConvBN(key_dim, key_dim, side, groups=key_dim, **place) for side in sides])
        self.position = AbsoluteOffsets(num_heads, key_dim, size=window).to(**place)
        self.out_proj = ConvBN(dim, dim, scale=out_scale, **place)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Into windows, the cascade, the projection, out of the windows."""
        windows = self._windows(grid)
        inside, mask = self._split(x, masks.query, windows)
        q, k, v, heads = self._cascade(inside, mask, windows.window)
        self.emit("values", lambda: self._merge(v, windows, x.shape[0]))
        self.emit("mixed", lambda: self._merge(heads, windows, x.shape[0]))
        self.emit("attention", lambda: self._maps(q, k, mask, windows, x.shape[0]))
        y = self.out_proj(torch.relu(rearrange(heads, "w h s e -> w s (h e)")), windows.window, mask)
        return windows.merge(rearrange(y, "(b w) s c -> b w s c", b=x.shape[0]))

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The softmax maps of all heads, zero between windows."""
        windows = self._windows(grid)
        inside, mask = self._split(x, masks.query, windows)
        q, k, _, _ = self._cascade(inside, mask, windows.window)
        return self._maps(q, k, mask, windows, x.shape[0])

    def _windows(self, grid: Grid) -> Windows:
        grid = (1, *grid) if len(grid) == 1 else tuple(grid)
        sides = [min(self.window, side) for side in grid]
        if self.border == "zero_tokens" and grid[0] > 1 and max(grid) > self.window:
            sides = [self.window] * 2  # the authors fill whole windows, but leave a grid that fits into one as it is
        return Windows(grid, tuple(sides))

    def _split(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, windows: Windows
    ) -> tuple[Float[Tensor, "w s c"], Bool[Tensor, "w s"] | None]:
        """The windows of all examples, and which of their cells take part."""
        inside = windows.split(x).flatten(0, 1)
        if mask is None and windows.padded == windows.grid:
            return inside, None
        real = torch.ones_like(x[..., :1], dtype=torch.bool) if mask is None else mask.unsqueeze(-1)
        real = windows.pad(real, value=self.border == "zero_tokens")
        return inside, Windows(windows.padded, windows.window).split(real).flatten(0, 1).squeeze(-1)

    def _bias(self, q: Float[Tensor, "w h s d"], window: Grid) -> Float[Tensor, "1 h s s"]:
        return self.position.bias(q, q.shape[2], causal=False, grid=window)  # type: ignore[return-value]

    def _cascade(
        self, x: Float[Tensor, "w s c"], mask: Bool[Tensor, "w s"] | None, window: Grid
    ) -> tuple[Float[Tensor, "w h s d"], Float[Tensor, "w h s d"], Float[Tensor, "w h s e"], Float[Tensor, "w h s e"]]:
        """Queries, keys, values and outputs of all heads."""
        found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        bias = self._bias(x.new_zeros(1, self.num_heads, x.shape[1], self.key_dim), window)
        for i, source in enumerate(x.chunk(self.num_heads, dim=-1)):
            if found:
                source = source + found[-1][-1]
            q, k, v = self.qkvs[i](source, window, mask).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
            q = self.q_convs[i](q, window, mask)
            head = attention(q[:, None], k[:, None], v[:, None], bias=bias[:, i : i + 1], key_mask=mask)
            found.append((q, k, v, head[:, 0]))
        queries, keys, values, outputs = (torch.stack(each, dim=1) for each in zip(*found, strict=True))
        return queries, keys, values, outputs

    def _maps(
        self,
        q: Float[Tensor, "w h s d"],
        k: Float[Tensor, "w h s d"],
        mask: Bool[Tensor, "w s"] | None,
        windows: Windows,
        batch: int,
    ) -> Float[Tensor, "b h n n"]:
        """The maps of the windows as maps of the tokens."""
        identity = torch.eye(q.shape[2], device=q.device, dtype=q.dtype).expand(*q.shape[:2], -1, -1)
        inside = attention(q, k, identity, bias=self._bias(q, windows.window), key_mask=mask)
        n = windows.grid[0] * windows.grid[1]
        tokens = torch.eye(n, device=q.device, dtype=q.dtype)[None]  # cells outside the grid belong to none
        rows = torch.einsum("bwhst,wtn->bwshn", inside.unflatten(0, (batch, -1)), windows.split(tokens)[0])
        return rearrange(windows.merge(rows.flatten(3)), "b n (h m) -> b h n m", h=self.num_heads)

    def _merge(self, x: Float[Tensor, "w h s e"], windows: Windows, batch: int) -> Float[Tensor, "b h n e"]:
        tokens = windows.merge(rearrange(x, "(b w) h s e -> b w s (h e)", b=batch))
        return rearrange(tokens, "b n (h e) -> b h n e", h=self.num_heads)
