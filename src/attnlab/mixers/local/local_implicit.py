"""Local implicit attention: a query at any point of a video attends to the cells around it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked


class _Place(NamedTuple):
    """One place of all windows: its row there, each point's cell, and whether that is inside of the grid."""

    row: int
    cells: Int[Tensor, "p"]
    inside: Bool[Tensor, "p"]


@mixers.register(
    "local_implicit",
    family="local",
    paper="evenhancer",
    supports=Supports(grid=frozenset({2, 3}), cost=1.0),
    partial=True,
    example={"radius": 1, "frames": 1, "hidden": (16,)},
)
class LocalImplicitAttention(Mixer):
    r"""Attention from continuous coordinates to the nearest cells, frame by frame, decoded by an MLP (EvEnhancer, 2025, LIVT).

    Of a T x H x W grid, with Q, K, V made by convolutions of $3^3$ cells. A point at time $\tau$ (in frames) and position
    $p \in [-1, 1]^2$ has the centre frame $c = \mathrm{round}(\tau)$, the nearest cell $\bar p$, a query q interpolated
    trilinearly, and for each frame $c + f$, $|f| \le r_t$ (clamped to those there are), the $(2 r + 1)^2$ keys around $\bar p$:

    $$a_{f \delta} = \mathrm{softmax}_\delta\big(d^{-1/2}\, q^\top k_{f \delta} + b_\delta\big) \qquad
      b_\delta = w^\top [\sin \Phi_\delta, \cos \Phi_\delta] \qquad \Phi_\delta = (p - p_\delta)_y\, H\,\phi$$
    $$y = \mathrm{MLP}\big([a_{f \delta} v_{f \delta}]_{f \delta},\; q,\; s\big)$$

    with frequencies $\phi = 2^{0 \dots 10} - 1$; all heads share b, in which columns have no part. The softmax is over the keys
    of one frame; weighted values are not summed but stand side by side, and s is the size of the points' cells. Cells
    beyond the sides of a frame are zero keys and values, which take part. `forward` asks at every cell's own centre, `sample`
    anywhere. One place of the windows at a time, the MLP's first layer included: no window is copied. With K weights a point,
    time O(n K C M) for a hidden width M, memory O(n (C + M + h (2 r + 1)^2)), and O(n K C) where gradients are kept.

    Masked cells are zero in the convolutions, and zero keys and values as cells beyond the sides are.

    Args:
        dim: C, width of the tokens.
        num_heads: heads.
        causal: always False.
        radius: r.
        frames: $r_t$.
        frequencies: how many $\phi$ there are.
        hidden: widths of the MLP's hidden layers, with GELU.
        aggregate: "concat", the authors', or "sum": weighted values are summed over keys and frames, as in attention.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a negative radius, no frequency or hidden layer, or an unknown aggregate.
        UnsupportedError: with ``causal=True``, or without a grid of rank 2 (one frame) or 3.

    Differs from the paper: its b has a constant and phases of the time's offset, too, which are alike for all keys of a frame and
    leave such a softmax as it is; they are left out. The event branch and its deformable alignment are no part of it. The paper
    decodes colours; here the MLP gives as many channels as the tokens have.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        radius: int = 3,
        frames: int = 2,
        frequencies: int = 16,
        hidden: Sequence[int] = (256, 256, 256, 256),
        aggregate: str = "concat",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if min(radius, frames) < 0:
            raise ValueError(f"radius, frames: expected at least 0, got {radius} and {frames}")
        if frequencies < 1 or not hidden or min(hidden) < 1:
            raise ValueError(f"frequencies, hidden: expected positive numbers, got {frequencies} and {hidden}")
        if aggregate not in ("concat", "sum"):
            raise ValueError(f"aggregate: expected 'concat' or 'sum', got {aggregate!r}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.radius, self.frames, self.frequencies, self.aggregate = radius, frames, frequencies, aggregate
        self.q_proj, self.k_proj, self.v_proj = (nn.Conv3d(dim, dim, 3, **place) for _ in range(3))
        self.offset_bias = nn.Linear(2 * frequencies, 1, bias=False, **place)
        count = (2 * frames + 1) * (2 * radius + 1) ** 2 if aggregate == "concat" else 1
        widths = [count * dim + dim + 2, *hidden, dim]
        self.first = nn.Linear(widths[0], widths[1], **place)
        self.layers = nn.ModuleList(nn.Linear(a, b, **place) for a, b in itertools.pairwise(widths[1:]))

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Every cell asks at its own centre; a map is a video of one frame."""
        grid = (1, *grid) if len(grid) == 2 else grid
        sides = [torch.arange(side, device=x.device, dtype=torch.float64) for side in grid]
        sides[1:] = [(2 * cells + 1) / side - 1 for cells, side in zip(sides[1:], grid[1:], strict=True)]
        points = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 2)
        return self.sample(x, points, grid=grid, mask=masks.query)

    def sample(
        self,
        x: Float[Tensor, "b n c"],
        points: Float[Tensor, "p 3"],
        *,
        grid: Grid,
        cell: tuple[float, float] = (2.0, 2.0),
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b p c"]:
        """What stands at points between the cells.

        Args:
            x: tokens of the grid.
            points: time in frames, 0 to T - 1, then row and column from -1 to 1 over all cells; float64 keeps their phases.
            grid: (T, H, W).
            cell: s, height and width of a point's cell, 2 being those of the grid's.
            mask: (b, n), True marks a real cell.

        Raises:
            ValueError: for a grid of another rank.
        """
        if len(grid) != 3:
            raise ValueError(f"grid: expected three sides, got {tuple(grid)}")
        # Padded here, not by the convolutions: torch 2.13 gets their bfloat16 gradients wrong on sides below the kernel's.
        image = F.pad(to_grid(zero_masked(x, mask), grid), (1,) * 6)
        q, k, v = (
            rearrange(zero_masked(from_grid(proj(image)), mask), "b n (h d) -> b h n d", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = self._interpolate(q, points, grid)
        flat = rearrange(query, "b h p d -> b p (h d)")
        size = flat.new_tensor(cell).expand(*flat.shape[:2], 2)
        near, rest = self.first.weight.split([self.first.in_features - self.dim - 2, self.dim + 2], dim=1)
        y = F.linear(torch.cat((flat, size), dim=-1), rest, self.first.bias) + self._read(query, k, v, near, points, grid)
        for layer in self.layers:
            y = layer(F.gelu(y))
        return y

    def _places(self, points: Float[Tensor, "p 3"], grid: Grid, frame: int) -> Iterator[_Place]:
        """The places of all windows in one frame, rows before columns."""
        near = [_nearest(points[:, 1 + axis], side) for axis, side in enumerate(grid[1:])]
        at = (points[:, 0].round() + frame - self.frames).clamp(0, grid[0] - 1).long()
        around = range(-self.radius, self.radius + 1)
        for row, column in itertools.product(around, around):
            y, x = near[0] + row, near[1] + column
            inside = (y >= 0) & (y < grid[1]) & (x >= 0) & (x < grid[2])
            cells = (at * grid[1] + y.clamp(0, grid[1] - 1)) * grid[2] + x.clamp(0, grid[2] - 1)
            yield _Place(row + self.radius, cells, inside)

    def _weights(
        self, q: Float[Tensor, "b h p d"], k: Float[Tensor, "b h n d"], by_row: Float[Tensor, "p r"], places: Iterator[_Place]
    ) -> Float[Tensor, "b h p k"]:
        """The weights of the places of a frame."""
        logits = []
        for place in places:
            products = (q * k.index_select(2, place.cells)).sum(-1) * q.shape[-1] ** -0.5
            logits.append(products.masked_fill(~place.inside, 0.0) + by_row[:, place.row].to(q.dtype))
        return torch.stack(logits, dim=-1).softmax(-1)

    def _read(
        self,
        q: Float[Tensor, "b h p d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        kernel: Float[Tensor, "o i"],
        points: Float[Tensor, "p 3"],
        grid: Grid,
    ) -> Float[Tensor, "b p o"]:
        """The weighted values by the columns of the MLP's first layer, those of each place or the same for all.

        The weights of one frame are there at a time.
        """
        by_row = self._bias(points, grid)
        parts = iter(kernel.split(self.dim, dim=1))
        total = v.new_zeros(v.shape[0], len(points), len(kernel))
        summed = v.new_zeros(v.shape[0], len(points), self.dim)
        for frame in range(2 * self.frames + 1):
            weights = self._weights(q, k, by_row, self._places(points, grid, frame))
            for number, place in enumerate(self._places(points, grid, frame)):
                share = weights[..., number].masked_fill(~place.inside, 0.0).unsqueeze(-1)
                values = rearrange(share * v.index_select(2, place.cells), "b h p d -> b p (h d)")
                if self.aggregate == "concat":
                    total = total + F.linear(values, next(parts))
                else:
                    summed = summed + values
        return total if self.aggregate == "concat" else F.linear(summed, kernel)

    def _bias(self, points: Float[Tensor, "p 3"], grid: Grid) -> Float[Tensor, "p r"]:
        """b of the rows of each point's window."""
        phases = 2.0 ** torch.linspace(0, 10, self.frequencies, device=points.device, dtype=points.dtype) - 1
        rows = torch.arange(2 * self.radius + 1, device=points.device) - self.radius
        cells = (_nearest(points[:, 1], grid[1])[:, None] + rows).to(points.dtype)
        keys = (2 * cells + 1) / grid[1] - 1
        angle = ((points[:, 1:2] - keys) * grid[1]).unsqueeze(-1) * phases
        encoded = torch.cat((angle.sin(), angle.cos()), dim=-1)
        found: Tensor = self.offset_bias(encoded.to(self.offset_bias.weight.dtype)).squeeze(-1)
        return found

    def _interpolate(self, q: Float[Tensor, "b h n d"], points: Float[Tensor, "p 3"], grid: Grid) -> Float[Tensor, "b h p d"]:
        """Trilinear queries from the frames of each point's window; nothing stands beyond these, or the sides of a frame."""
        center = points[:, 0].round()
        places = [points[:, 0] - center + self.frames, *(_position(points[:, 1 + i], grid[1 + i]) for i in range(2))]
        limits = (2 * self.frames + 1, *grid[1:])
        out = q.new_zeros(*q.shape[:2], len(points), q.shape[3])
        for corner in itertools.product((0, 1), repeat=3):
            cells = [place.floor() + more for place, more in zip(places, corner, strict=True)]
            share = torch.ones_like(center)
            for place, cell, limit in zip(places, cells, limits, strict=True):
                share = share * (1 - (place - cell).abs()) * ((cell >= 0) & (cell < limit))
            frame = (center + cells[0] - self.frames).clamp(0, grid[0] - 1)
            row, column = (cell.clamp(0, limit - 1) for cell, limit in zip(cells[1:], grid[1:], strict=True))
            index = ((frame * grid[1] + row) * grid[2] + column).long()
            out = out + q.index_select(2, index) * share.to(q.dtype).unsqueeze(-1)
        return out


def _position(x: Float[Tensor, "p"], side: int) -> Float[Tensor, "p"]:
    """Coordinates from -1 to 1 in cells, 0 being the centre of the first."""
    return ((x + 1) * side - 1) / 2


def _nearest(x: Float[Tensor, "p"], side: int) -> Int[Tensor, "p"]:
    """The cell whose centre is nearest; the even one of two."""
    return _position(x, side).round().clamp(0, side - 1).long()
