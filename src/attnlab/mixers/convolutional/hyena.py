"""Hyena N-D: gates and long implicit convolutions in turn, on sequences and grids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.core.state import State
from attnlab.core.streaming import StreamingMixer
from attnlab.mixers.convolutional.directions import Axes, corners, from_corners, to_one_corner
from attnlab.mixers.convolutional.hyena_filter import ImplicitFilter
from attnlab.ops.long_conv import long_conv

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
DIRECTIONS = ("standard", "4dir", "4dirp", "seq", "parallel")
_TAPS = 3


@mixers.register(
    "hyena",
    family="convolutional",
    paper="hyena-nd",
    supports=Supports(causal="optional", streaming=True, grid=frozenset({1, 2}), mixing_matrix=True, state="grows", cost=1.0),
    example={"max_side": 2048, "filter_width": 8},
)
class Hyena(StreamingMixer):
    r"""Hyena on grids of one, two or three axes (Zimerman and Wolf 2023; Hyena, Poli et al. 2023, definition 3.1).

    Of order N: $[x_0, \dots, x_{N-1}, v]$ is a 3-tap depthwise convolution (3 x 3, ...) of a linear map of the tokens, and

    $$v \leftarrow k_o * (x_{N-1-o} \odot v) + D_o \odot (x_{N-1-o} \odot v), \quad o = 0, \dots, N - 2, \qquad
      y = W_o\,(x_0 \odot v)$$

    with a filter a channel and step over the quadrant behind a place (`ImplicitFilter`). Time O(N C n log n), memory O(N C n).
    Directions other than the one quadrant:

    - "4dir": all factors flipped along no, both, the last, the first axis (2 copies of a sequence, 8 of a volume), what comes of
      them flipped back and mixed with one weight a copy and a bias; "4dirp": mixed by a linear map of all copies' channels.
    - "seq": the first step's convolution from the opposite corner.
    - "parallel": the short filter gives 4 factors for each, in 4 groups of C channels with the same long filters, which the
      output projection takes together. (No flip is in the authors' code.)

    Causal, the short filter looks back as well, so that on a grid the order is row by row. State: ``window`` (b, 2, (N + 1) C),
    the last inputs of the short filter, and ``past`` (b, (N - 1) C, m), those of the long filters, which have no state of bounded
    size.

    ``record`` collects "values" and "mixed" (b, copies C, n, 1): every channel of every copy is a head of the mixing matrix,
    $\mathrm{diag}(x_0)\,(K_{N-2} + D_{N-2})\,\mathrm{diag}(x_1) \cdots$.

    Args:
        dim: C.
        num_heads: of the common signature; the mechanism has no heads.
        causal: see above; with "standard" and "parallel" directions.
        order: N, at least 2.
        rank: axes of the filters, 1 to 3; a grid of fewer has sides of 1 in front.
        directions: one of `DIRECTIONS`.
        max_side: L, the largest side of a grid, that positions are relative to.
        filter_kind: "product" or "full".
        window: "standard", "learn", "symmetric" (of the full filter) or "none".
        sqrt_window: take the square root of the window.
        emb_dim: features of a position.
        filter_width: of the filters' networks.
        num_inner: their hidden layers after the first.
        learn_positions: whether the features of positions are learned.
        scale: of the filters, "official" for the authors' 1/(2 L), which their two-dimensional code has, or "none".
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: for a grid of higher rank.
        ValueError: for options that do not fit, and in use for a side above L.

    Differs from the paper: grids need not be square, nor as large as L. Masked tokens are 0 to both filters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        order: int = 2,
        rank: int = 2,
        directions: str = "standard",
        max_side: int = 256,
        filter_kind: str = "product",
        window: str = "standard",
        sqrt_window: bool = False,
        emb_dim: int = 3,
        filter_width: int = 64,
        num_inner: int = 2,
        learn_positions: bool = True,
        scale: str = "official",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.rank = rank
        self._promises = replace(self.info.supports, grid=frozenset(range(1, rank + 1)))
        super().__init__(dim, num_heads, causal=causal)
        _check(order, rank, directions, causal, filter_kind, window, scale)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.order, self.directions, self.max_side = order, directions, max_side
        self.groups = 4 if directions == "parallel" else 1
        self.flips: list[Axes] = corners(rank) if directions in ("4dir", "4dirp") else [()]
        inner = (order + 1) * dim
        self.in_proj = nn.Linear(dim, inner, **place)
        taps = (_TAPS,) * rank
        bound = _TAPS ** (-rank / 2)
        self.short_weight = nn.Parameter(torch.empty(self.groups * inner, 1, *taps, **place).uniform_(-bound, bound))
        self.short_bias = nn.Parameter(torch.empty(self.groups * inner, **place).uniform_(-bound, bound))
        self.filter = ImplicitFilter(
            dim * (order - 1),
            rank,
            max_side,
            kind=filter_kind,
            window=window,
            emb_dim=emb_dim,
            width=filter_width,
            num_inner=num_inner,
            learn_positions=learn_positions,
            sqrt_window=sqrt_window,
            **place,
        )
        self.scale = 1.0 / (2 * max_side) if scale == "official" else 1.0
        self.skip = nn.Parameter(torch.randn(order - 1, dim, **place))
        self.copies: nn.Linear | None = None
        if directions == "4dir":
            self.copies = nn.Linear(len(self.flips), 1, **place)
        elif directions == "4dirp":
            self.copies = nn.Linear(len(self.flips) * dim, dim, **place)
        self.out_proj = nn.Linear(self.groups * dim, dim, **place)

    @property
    def supports(self) -> Supports:
        """Grids of up to ``rank`` axes."""
        return self._promises

    def begin(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """Nothing read."""
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = self.groups * (self.order - 1) * self.dim
        return State(
            {
                "window": torch.zeros(batch_size, _TAPS - 1, self.in_proj.out_features, **place),
                "past": torch.zeros(batch_size, channels, 0, **place),
            }
        )

    def advance(
        self, x: Float[Tensor, "b n c"], state: State, *, mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], State]:
        """Both filters over what was kept and the new tokens."""
        n, kept = x.shape[1], state["past"].shape[2]
        grid = (*[1] * (self.rank - 1), kept + n)
        self._check_sides(grid)
        z = zero_masked(self.in_proj(x), mask)
        window = torch.cat((state["window"].to(z.dtype), z), dim=1)
        factors = self._factors(window, (*grid[:-1], n), mask, whole=False)
        steps = state["past"].unflatten(1, (self.order - 1, -1)).unbind(1)
        past = [step.reshape(self.groups * len(x), self.dim, *grid[:-1], kept) for step in steps]
        y, inputs = self._recur(factors[:-1], factors[-1], self._kernels(grid), past)
        new = torch.stack([u.reshape(len(x), -1, n) for u in inputs], dim=1).flatten(1, 2)
        after = state.grow(2, past=new).replace(window=window[:, -(_TAPS - 1) :])
        return self._join([y]), after

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Gates and convolutions, from every corner."""
        grid = self._as_rank(grid)
        factors = self._factors(zero_masked(self.in_proj(x), masks.query), grid, masks.query)
        copies = self._from_all_corners(factors[:-1], factors[-1], self._kernels(grid))
        self.emit("values", lambda: self._heads([factors[-1]] * len(copies), len(x)))
        self.emit("mixed", lambda: self._heads(copies, len(x)))
        return self._join(copies)

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """What gates and convolutions make of a unit impulse at each token."""
        grid, (b, n) = self._as_rank(grid), x.shape[:2]
        *gates, v = self._factors(zero_masked(self.in_proj(x), masks.query), grid, masks.query)
        impulses = torch.eye(n, device=x.device, dtype=v.dtype).view(1, n, 1, 1, *grid)
        spread = impulses.expand(b, n, self.groups, self.dim, *grid).flatten(0, 2)
        gates = [gate.unflatten(0, (b, 1, self.groups)).expand(b, n, *[-1] * (gate.dim())).flatten(0, 2) for gate in gates]
        copies = self._from_all_corners(gates, spread, self._kernels(grid))
        matrix = self._heads(copies, b * n)[..., 0].unflatten(0, (b, n)).permute(0, 2, 3, 1)
        return matrix.tril() if self.causal else matrix  # Fourier transforms leave rounding errors above

    def _as_rank(self, grid: Grid) -> Grid:
        if len(grid) > self.rank:
            raise self._refusal(f"a grid of rank {len(grid)} with rank={self.rank}", "its filters have fewer axes")
        grid = (*[1] * (self.rank - len(grid)), *grid)
        self._check_sides(grid)
        return grid

    def _check_sides(self, grid: Grid) -> None:
        if max(grid) > self.max_side:
            raise ValueError(f"grid: expected sides of at most max_side={self.max_side}, got {grid}")

    def _kernels(self, grid: Grid) -> Float[Tensor, "o c *grid"]:
        return self.scale * self.filter(grid).unflatten(0, (self.order - 1, self.dim))

    def _factors(
        self, z: Float[Tensor, "b m e"], grid: Grid, mask: Bool[Tensor, "b n"] | None, *, whole: bool = True
    ) -> tuple[Tensor, ...]:
        """x_0, ..., x_{N-1} and v, (b groups, C, *grid) each; a piece of a stream has its window in ``z``, too."""
        sides = grid if whole else (*grid[:-1], grid[-1] + _TAPS - 1)
        image = to_grid(z, sides)
        if self.causal:
            ends = [_TAPS - 1 if whole else 0, 0, *[_TAPS - 1, 0] * (self.rank - 1)]
        else:
            ends = [_TAPS // 2] * (2 * self.rank)
        convolve = _CONVOLUTIONS[self.rank - 1]
        mixed = convolve(F.pad(image, ends), self.short_weight.to(z.dtype), self.short_bias.to(z.dtype), groups=z.shape[2])
        if mask is not None:
            mixed = mixed.masked_fill(~mask.view(len(mask), 1, *grid), 0.0)
        groups = mixed.unflatten(1, (self.groups, -1)).flatten(0, 1)
        return groups.split(self.dim, dim=1)

    def _recur(
        self,
        gates: tuple[Tensor, ...] | list[Tensor],
        v: Float[Tensor, "b c *grid"],
        kernels: Float[Tensor, "o c *sides"],
        past: list[Tensor] | None = None,
    ) -> tuple[Float[Tensor, "b c *grid"], list[Tensor]]:
        """The steps from one corner, and the inputs of the long filters; ``past`` has those of the tokens before."""
        inputs, turned = [], tuple(range(-self.rank, 0))
        for step, gate in enumerate(reversed(gates[1:])):
            u = gate * v
            inputs.append(u)
            if past is not None:
                v = long_conv(torch.cat((past[step].to(u.dtype), u), dim=-1), kernels[step], self.skip[step], last=u.shape[-1])
            elif self.directions == "seq" and step == 0:
                v = long_conv(u.flip(turned), kernels[step], self.skip[step]).flip(turned)
            else:
                v = long_conv(u, kernels[step], self.skip[step])
        return gates[0] * v, inputs

    def _from_all_corners(
        self, gates: tuple[Tensor, ...] | list[Tensor], v: Float[Tensor, "b c *grid"], kernels: Float[Tensor, "o c *grid"]
    ) -> list[Float[Tensor, "b c *grid"]]:
        y, _ = self._recur([from_corners(gate, self.flips) for gate in gates], from_corners(v, self.flips), kernels)
        return to_one_corner(y, self.flips)

    def _join(self, copies: list[Float[Tensor, "bg c *grid"]]) -> Float[Tensor, "b n c"]:
        """Copies and groups to tokens."""
        tokens = [from_grid(y.unflatten(0, (-1, self.groups)).flatten(1, 2)) for y in copies]
        if self.copies is None:
            return self.out_proj(tokens[0])
        stacked = torch.stack(tokens, dim=-1)
        mixed = self.copies(stacked).squeeze(-1) if self.directions == "4dir" else self.copies(stacked.flatten(-2))
        return self.out_proj(mixed)

    def _heads(self, copies: list[Float[Tensor, "bg c *grid"]], batch: int) -> Float[Tensor, "b h n 1"]:
        """Every channel of every copy and group as a head."""
        return torch.cat([y.reshape(batch, -1, *y.shape[2:]).flatten(2) for y in copies], dim=1).unsqueeze(-1)


def _check(order: int, rank: int, directions: str, causal: bool, filter_kind: str, window: str, scale: str) -> None:
    if order < 2:
        raise ValueError(f"order: expected at least 2, got {order}")
    if rank not in (1, 2, 3):
        raise ValueError(f"rank: expected 1, 2 or 3, got {rank}")
    if directions not in DIRECTIONS:
        raise ValueError(f"directions: expected one of {DIRECTIONS}, got {directions!r}")
    if causal and directions not in ("standard", "parallel"):
        raise ValueError(f"directions: expected 'standard' or 'parallel' with causal=True, got {directions!r}")
    if window == "symmetric" and filter_kind == "product":
        raise ValueError("window: expected another than 'symmetric' with filter_kind='product', whose axes are apart")
    if scale not in ("official", "none"):
        raise ValueError(f"scale: expected 'official' or 'none', got {scale!r}")
