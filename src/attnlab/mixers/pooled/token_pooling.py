"""Token-aware average pooling: each token chooses the neighbourhood it is averaged over before it is mixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.catalog import create_mixer, mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.core.record import record, recording
from attnlab.mixers.parts.conv_bn import ConvBN


def box_mean(x: Float[Tensor, "b c h w"], dilation: int) -> Float[Tensor, "b c h w"]:
    """Sum of the nine cells at distance 0 or ``dilation`` on each axis, zero outside, divided by nine."""
    for axis in (2, 3):
        around = (0, 0, dilation, dilation) if axis == 2 else (dilation, dilation)
        wide, side = F.pad(x, around), x.shape[axis]
        x = wide.narrow(axis, 0, side) + wide.narrow(axis, dilation, side) + wide.narrow(axis, 2 * dilation, side)
    return x / 9.0


@mixers.register(
    "token_pooling",
    family="pooled",
    paper="tap-adl",
    supports=Supports(grid=frozenset({1, 2}), mixing_matrix=True, batch_coupled=True, cost=2.0),
    example={"scales": 3},
)
class TokenPooling(Mixer):
    r"""Token-aware average pooling in front of a mixer (Guo et al. 2023).

    With $\mathrm{pool}_0(X) = X$, $\mathrm{pool}_r(X)$ the mean of the nine cells at distance 0 or r on each axis, and one
    softmax over K scales a token, shared by its channels,

    $$S = \mathrm{softmax}_r\big(\mathrm{Conv}_3(\mathrm{BN}(\mathrm{Conv}_3(X)))/T\big), \qquad
      Y = \mathrm{Mixer}\Big(\mathrm{Norm}\big(\textstyle\sum_r S_r \odot \mathrm{pool}_r(X)\big)\Big)$$

    The mean divides by nine at borders too: cells outside, and masked tokens, are zeros. The residual of the block around keeps
    the tokens as they were. Time O(n C K) beside the mixer's. ``record`` collects "scales" (b, n, K), "pooled" (b, n, C) and what
    the mixer emits, under ``mixer``.

    What this mixer supports is what ``mixer`` does, without a context, a pair_mask, causality and streaming: the pooling reads
    neighbours on all sides. In training the norm takes its statistics from all real tokens of the batch.

    Args:
        dim: width of the tokens.
        num_heads: of ``mixer``.
        causal: always False.
        mixer: a registered mixer that supports a grid of rank 2 and puts no token in front of it.
        mixer_options: its own options.
        scales: K, distances 0 to K - 1. A sequence is a grid of height 1.
        temperature: T.
        pooled_norm: LayerNorm between pooling and mixer: the authors' order, in a block whose own norm is "none".
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=True``, or a mixer that is always causal.
        ValueError: for no scale, a temperature that is not positive, or a mixer without grids of rank 2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = False,
        mixer: str = "softmax",
        mixer_options: Mapping[str, Any] | None = None,
        scales: int = 4,
        temperature: float = 1.0,
        pooled_norm: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if scales < 1:
            raise ValueError(f"scales: expected at least 1, got {scales}")
        if temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = create_mixer(mixer, dim, num_heads, causal=False, **place, **(mixer_options or {}))
        if 2 not in inner.supports.grid or inner.num_prefix:
            raise ValueError(f"mixer: expected one for grids of rank 2 without tokens in front of them, got {mixer!r}")
        self.scales, self.temperature = scales, temperature
        self.score = ConvBN(dim, scales, 3, **place)
        self.choose = nn.Conv2d(scales, scales, 3, padding=1, bias=False, **place)
        self.norm = nn.LayerNorm(dim, **place) if pooled_norm else nn.Identity()
        self.mixer = inner

    @property
    def supports(self) -> Supports:
        """What the mixer inside promises, as far as pooled tokens allow it."""
        inner = self._modules.get("mixer")
        if not isinstance(inner, Mixer):
            return self.info.supports  # type: ignore[attr-defined]
        have = inner.supports
        return replace(
            self.info.supports,  # type: ignore[attr-defined]
            mask=have.mask,
            grid=have.grid & {1, 2},
            mixing_matrix=have.mixing_matrix,
            cost=max(have.cost, 1.0),
        )

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Pool, then mix."""
        pooled = self._pool(x, masks, grid)
        if not (recording() and self.supports.mixing_matrix):
            return self.mixer(pooled, mask=masks.query, grid=grid)
        with record(self.mixer, only=("values", "mixed")) as tape:
            y = self.mixer(pooled, mask=masks.query, grid=grid)
        for name in ("values", "mixed"):  # what `mixing_matrix` multiplies, under this mixer's own name
            self.emit(name, tape[name])
        return y

    def matrix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b h n m"]:
        """That of the mixer, on the pooled tokens."""
        return self.mixer.mixing_matrix(self._pool(x, masks, grid), mask=masks.query, grid=grid)

    def _pool(self, x: Float[Tensor, "b n c"], masks: Masks, grid: Grid) -> Float[Tensor, "b n c"]:
        sides = (1, *grid) if len(grid) == 1 else grid
        scores = self.choose(to_grid(self.score(x, sides, masks.query), sides))
        shares = (scores / self.temperature).softmax(dim=1)
        image = to_grid(x, sides)
        pooled = shares[:, :1] * image
        for r in range(1, self.scales):
            pooled = pooled + shares[:, r : r + 1] * box_mean(image, r)
        self.emit("scales", lambda: from_grid(shares))
        out = zero_masked(from_grid(pooled).to(x.dtype), masks.query)
        self.emit("pooled", out)
        return zero_masked(self.norm(out), masks.query)
