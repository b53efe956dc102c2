"""Implicit filters: a small network of the position gives the weight of every place, in one axis or in all at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.mixers.convolutional.hyena_window import Window


class SineNetwork(nn.Module):
    r"""$W_{m+1} \sin(f \odot (W_m \cdots \sin(f \odot (W_0 z + b_0)) \cdots + b_m))$ with one frequency vector f.

    Args:
        in_features: width of z.
        width: of the hidden layers.
        out_features: width of the result.
        num_inner: m.
        frequency: f, which may belong to several networks.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        out_features: int,
        num_inner: int,
        frequency: nn.Parameter,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [in_features, *[width] * num_inner]
        self.layers = nn.ModuleList(nn.Linear(size, width, **place) for size in widths)
        self.last = nn.Linear(width, out_features, bias=False, **place)
        self.frequency = frequency

    def forward(self, z: Float[Tensor, "*s e"]) -> Float[Tensor, "*s c"]:
        """The network at each position."""
        for layer in self.layers:
            z = torch.sin(self.frequency * layer(z))
        return self.last(z)


class ImplicitFilter(nn.Module):
    r"""Filters on a grid of any sides up to L (Poli et al. 2023, Hyena, section 3.3; Zimerman and Wolf 2023).

    Position a of an axis has the features $z_a = [t, \cos(f_1 w), \dots, -\sin(f_1 w), \dots]$ with $t = a/(L-1)$, $w = 2 \pi
    a/L$ and $f$ from $10^{-4}$ to bands - 1, bands = (e - 1)/2; they are where learned positions begin. A product filter is
    $\prod_x h_x(a_x)$, a network an axis and of rank 1; a full one is one network of all axes' features.

    Args:
        channels: filters.
        rank: axes.
        max_side: L.
        kind: "product" or "full".
        window: see `Window`.
        emb_dim: e, odd and at least 3.
        width: of the networks.
        num_inner: hidden layers after the first.
        learn_positions: whether z is a parameter.
        sqrt_window: see `Window`.

    Raises:
        ValueError: for an unknown kind, an even e, or sizes below 1.
    """

    def __init__(
        self,
        channels: int,
        rank: int,
        max_side: int,
        *,
        kind: str = "product",
        window: str = "standard",
        emb_dim: int = 3,
        width: int = 64,
        num_inner: int = 2,
        learn_positions: bool = True,
        sqrt_window: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("product", "full"):
            raise ValueError(f"filter_kind: expected 'product' or 'full', got {kind!r}")
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"emb_dim: expected an odd number of at least 3, got {emb_dim}")
        for name, size, least in (("max_side", max_side, 1), ("filter_width", width, 1), ("num_inner", num_inner, 0)):
            if size < least:
                raise ValueError(f"{name}: expected at least {least}, got {size}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rank, self.max_side, self.kind = rank, max_side, kind
        self.z: Tensor
        z = _features(torch.linspace(0, 1, max_side, **place), emb_dim)
        if learn_positions:
            self.z = nn.Parameter(z)
        else:
            self.register_buffer("z", z)
        frequency = nn.Parameter(torch.ones(width, **place))
        count, inputs = (rank, emb_dim) if kind == "product" else (1, rank * emb_dim)
        self.networks = nn.ModuleList(SineNetwork(inputs, width, channels, num_inner, frequency, **place) for _ in range(count))
        axes = 1 if kind == "product" else rank
        self.windows = nn.ModuleList(Window(channels, axes, window, sqrt=sqrt_window, **place) for _ in range(count))

    def forward(self, sides: Grid) -> Float[Tensor, "c *grid"]:
        """The filters' weights, the place itself first."""
        places = torch.arange(max(sides), device=self.z.device, dtype=self.z.dtype) / max(self.max_side - 1, 1)
        t = [places[:side] for side in sides]
        if self.kind == "product":
            axes = zip(sides, t, self.networks, self.windows, strict=True)
            parts = [window(network(self.z[:side]), [at]) for side, at, network, window in axes]
            weights = parts[0]
            for part in parts[1:]:
                weights = weights.unsqueeze(-2) * part
        else:
            spread = [
                self.z[:side].view(*[1] * axis, side, *[1] * (self.rank - 1 - axis), -1).expand(*sides, -1)
                for axis, side in enumerate(sides)
            ]
            weights = self.windows[0](self.networks[0](torch.cat(spread, dim=-1)), t)
        return weights.movedim(-1, 0)


def _features(t: Float[Tensor, " n"], emb_dim: int) -> Float[Tensor, "n e"]:
    bands = (emb_dim - 1) // 2
    places = torch.arange(len(t), device=t.device, dtype=t.dtype)
    frequencies = torch.linspace(1e-4, bands - 1, bands, device=t.device, dtype=t.dtype)
    angles = (2 * math.pi * places / len(t))[:, None] * frequencies
    return torch.cat((t[:, None], angles.cos(), -angles.sin()), dim=-1)
