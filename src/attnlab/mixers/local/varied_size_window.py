"""Windows of queries that read a predicted box: keys and values are sampled where each window and head wants them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.core.tilings import boxes
from attnlab.core.windows import Windows
from attnlab.mixers.attention import AttentionOptions
from attnlab.mixers.parts.tiled_attention import TiledAttention, zero_keys
from attnlab.ops.backends import accumulate_dtype

SLOPE = 0.01
"""Of the leaky ReLU before both regressions."""


@mixers.register(
    "varied_size_window",
    family="local",
    paper="vsa",
    supports=Supports(grid=frozenset({2}), mixing_matrix=True, cost=1.0),
    example={"window": 2},
)
class VariedSizeWindowAttention(TiledAttention):
    r"""Window attention whose windows of keys have a predicted size and place (Zhang et al. 2022, VSA, section 3.2).

    For each window T of w x w cells and each head, from the mean $\bar x_T$ of its tokens,

    $$(\delta_T, \sigma_T) = W\,\mathrm{LeakyReLU}(\bar x_T) + c, \qquad
      p_{Tu} = c_T + (1 + \sigma_T)\,e_u + \tfrac{1}{2}(N' - 1)\,\delta_T / \max(1, \lfloor N / w \rfloor)$$
    $$O_T = \mathrm{softmax}\big(d^{-1/2}\, Q_T K(p_T)^\top + B\big)\, V(p_T)$$

    along each axis: $c_T$ is the centre of the window and $e_u$ the distance of its cell u from there, in cells; N is the side of
    the map and N' that of whole windows, so that $\delta_T$ counts windows where both are large. K(p) and V(p) are read between
    cells by bilinear interpolation; what lies beyond the map is zeros, which take part in the softmax, and so are masked tokens.
    With $\delta = \sigma = 0$, as at first, this is window attention. Time O(n w^2 d), memory O(n d): the sampled keys and values
    are as many as there are cells in whole windows.

    ``record`` collects "shift" and "scale", the $\delta_T / \lfloor N / w \rfloor$ and $1 + \sigma_T$ of each head, window and
    axis (b, hk, windows, 2), columns before rows.

    Args:
        dim: width of the tokens.
        num_heads: heads; each key head has its own boxes.
        window: w, 7 in the paper.
        **options: those of `AttentionMixer`; ``position`` may be a bias of pairs on a grid of w cells a side. The paper has
            ``qkv_bias`` and ``position="offset_table"`` with ``{"size": w}``.

    Raises:
        ValueError: for a window below 1, or a position of another kind.
        UnsupportedError: for a grid that is not of rank 2, or with ``causal=True``.

    Differs from the paper: the regressions begin at zero, as the authors' code has a method for but does not call. A map smaller
    than a window counts as one window where they divide by zero.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, window: int = 7, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, **options)
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        self.window = window
        device, dtype = options.get("device"), options.get("dtype")
        self.shift_proj = nn.Linear(dim, 2 * self.num_kv_heads, device=device, dtype=dtype)
        self.scale_proj = nn.Linear(dim, 2 * self.num_kv_heads, device=device, dtype=dtype)
        for layer in (self.shift_proj, self.scale_proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def tiles(self, grid: Grid) -> tuple[Int[Tensor, "t x"], Int[Tensor, "t y"]]:
        """Windows of queries, and the keys that were sampled for each."""
        queries = boxes(grid, (self.window,) * len(grid))
        return queries, torch.arange(queries.numel()).view_as(queries)

    def term(self, q: Float[Tensor, "b h n d"], grid: Grid) -> tuple[Float[Tensor, "#h kinds x y"] | None, Tensor | None]:
        """The position on the window's grid."""
        return self.inside(q, (self.window,) * len(grid)), None

    def points(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b hk t s 2"]:
        """Where each window's keys are read: column and row, in cells, the first cell being at 0."""
        windows = Windows(grid, (self.window,) * 2)
        pooled = F.leaky_relu(windows.split(x).mean(dim=2), SLOPE)
        wide = accumulate_dtype(x.dtype)
        columns_first = tuple(reversed(grid))
        counts = torch.tensor([max(1, n // self.window) for n in columns_first], device=x.device)
        shift, scale = (
            layer(pooled).to(wide).unflatten(-1, (self.num_kv_heads, 2)).transpose(1, 2)
            for layer in (self.shift_proj, self.scale_proj)
        )
        shift = shift / counts
        self.emit("shift", shift)
        self.emit("scale", 1 + scale)
        cells, around = self.lattice(windows, x.device, wide)
        last = torch.tensor([n - 1 for n in reversed(windows.padded)], device=x.device)
        return cells + scale.unsqueeze(-2) * around + (shift * last / 2).unsqueeze(-2)

    def lattice(
        self, windows: Windows, device: torch.device, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "t s 2"], Float[Tensor, "s 2"]]:
        """Where the cells of each window are, and where they are from its centre: columns and rows, in cells."""
        firsts = self._pairs([torch.arange(n, device=device) * self.window for n in windows.counts], dtype)
        inside = self._pairs([torch.arange(self.window, device=device)] * 2, dtype)
        return firsts.unsqueeze(1) + inside, inside - (self.window - 1) / 2

    def sample(self, x: Float[Tensor, "b hk n e"], points: Float[Tensor, "b hk t s 2"], grid: Grid) -> Float[Tensor, "b hk ts e"]:
        """What stands at the points, by bilinear interpolation, zeros beyond the grid."""
        sides = torch.tensor(tuple(reversed(grid)), device=x.device)
        places = (2 * points + 1) / sides - 1
        image = x.to(points.dtype).mT.unflatten(-1, grid).flatten(0, 1)
        found = F.grid_sample(image, places.flatten(0, 1), mode="bilinear", padding_mode="zeros", align_corners=False)
        return found.flatten(2).mT.unflatten(0, x.shape[:2]).to(x.dtype)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Project, predict the boxes, attend to what is read there, project back."""
        q, k, v = self.project(x, None, self.place(x, masks.query))
        points = self.points(x, grid)
        heads = self._attend_at(points, q, k, v, masks, grid)
        self.emit("values", lambda: v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1))
        self.emit("mixed", heads)
        self.emit("attention", lambda: self._attend_at(points, q, k, self.identity(k), masks, grid))
        return self.join(heads, x, masks.query)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """The weights of the sampled keys, shared among the cells around them."""
        q, k, _ = self.project(x, None, self.place(x, masks.query))
        return self._attend_at(self.points(x, grid), q, k, self.identity(k), masks, grid)

    def _attend_at(
        self,
        points: Float[Tensor, "b hk t s 2"],
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b hk n d"],
        v: Float[Tensor, "b hk n e"],
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n e"]:
        """Attention of each window over what is read at its points."""
        k, v = (self.sample(t, points, grid) for t in zero_keys(k, v, masks.key))
        return self.attend(q, k, v, Masks(masks.query), grid)

    @staticmethod
    def _pairs(axes: list[Tensor], dtype: torch.dtype) -> Float[Tensor, "s 2"]:
        """All combinations of a row and a column, row-major, as (column, row)."""
        rows, columns = torch.meshgrid(*axes, indexing="ij")
        return torch.stack((columns, rows), dim=-1).flatten(0, 1).to(dtype)
