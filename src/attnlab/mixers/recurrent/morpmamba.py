"""MorpMamba: spatial and spectral maps of a patch, attention from one to the other, and a linear recurrence."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid, from_grid, to_grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks, zero_masked
from attnlab.mixers.parts.linear_recurrence import linear_recurrence
from attnlab.mixers.parts.morphology import Morphology
from attnlab.ops.attention import attention

GATES = ("transposed", "row", "centre")


@mixers.register(
    "morpmamba",
    family="recurrent",
    paper="morpmamba",
    supports=Supports(grid=frozenset({2}), cost=2.0),
    example={"inner_dim": 8, "state_dim": 6, "kernel_size": 3, "gate": "row"},
)
class MorpMamba(Mixer):
    r"""Spatial-spectral morphological state space (Ahmad et al. 2024, MorpMamba, as released).

    On a patch X of H x W cells with c bands, dil and ero as in `attnlab.mixers.parts.morphology.Morphology`, C inner channels:

    $$T_s = W_t [\mathrm{ero}(X); \mathrm{dil}(X)], \qquad T_p = W_t [\mathrm{ero}'(X); \mathrm{dil}'(X)]$$

    over the plane (H, W) of each band for $T_s$, and over the plane (c, H) of each column for $T_p$; $W_t$ has a bias.
    With gates from the middle row $r = T_s[\lfloor H/2 \rfloor]$ (W, C), on each map $\tilde T = T \odot \sigma(W r + b)$,

    $$a = \mathrm{MHA}(W_q \tilde T_s,\ W_k \tilde T_p,\ W_v \tilde T_p), \qquad
      s_t = W_a s_{t-1} + b_a + W_b a_t + b_b, \qquad y_t = W_o s_t$$

    over the cells row by row, from $s_0 = 0$. Time O(n^2 C + n (c k^2 + s^2)), memory O(n (c + C + s)).

    A masked cell is outside every neighbourhood, no key, and passed over by the recurrence.

    Args:
        dim: width of the tokens, c: the bands.
        num_heads: heads of the attention, a divisor of ``inner_dim`` too.
        causal: always False.
        inner_dim: C.
        state_dim: s.
        kernel_size: k, side of the neighbourhoods, odd.
        morphology: "convolution", as released, or "max_plus", which is what dilation and erosion are.
        columns: W, so that each column has elements of its own in $T_p$, as released; None for one that all columns of any grid
            share.
        gate: which cell of the middle row gates cell (i, j): "transposed", that of column i, as released, on square patches;
            "row", that of column j; "centre", the middle one for all.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UnsupportedError: with ``causal=True``; without a grid of rank 2.
        ValueError: for sizes that do not fit, an even kernel, an unknown morphology or gate; a patch that is not square where the
            gate is "transposed", or not as wide as ``columns``.

    Differs from the paper: there s after the last cell goes to a classifier, which is `last_state`; $y = W_o s$ for every cell
    makes a mixer of it. No dropout. For all its name the recurrence has neither selection nor discretisation; its transition is
    dense and unconstrained, and states of a long sequence may grow without bound.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        causal: bool = False,
        inner_dim: int = 64,
        state_dim: int = 128,
        kernel_size: int = 5,
        morphology: str = "convolution",
        columns: int | None = None,
        gate: str = "transposed",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        for name, size in (("inner_dim", inner_dim), ("state_dim", state_dim), ("columns", columns)):
            if size is not None and size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if inner_dim % num_heads:
            raise ValueError(f"inner_dim: expected a multiple of num_heads={num_heads}, got {inner_dim}")
        if gate not in GATES:
            raise ValueError(f"gate: expected one of {GATES}, got {gate!r}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.columns, self.gate = columns, gate
        self.spatial = Morphology(dim, kernel_size, morphology, **place)
        self.spectral = Morphology(columns or 1, kernel_size, morphology, **place)
        self.embed = nn.Linear(2 * dim, inner_dim, **place)
        self.spatial_gate = nn.Linear(inner_dim, inner_dim, **place)
        self.spectral_gate = nn.Linear(inner_dim, inner_dim, **place)
        self.q_proj = nn.Linear(inner_dim, inner_dim, **place)
        self.k_proj = nn.Linear(inner_dim, inner_dim, **place)
        self.v_proj = nn.Linear(inner_dim, inner_dim, **place)
        self.transition = nn.Linear(state_dim, state_dim, **place)
        self.write = nn.Linear(inner_dim, state_dim, **place)
        self.out_proj = nn.Linear(state_dim, dim, **place)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Maps, gates, attention, recurrence, and each state back to a token."""
        return self.out_proj(self._states(x, masks.query, grid))

    def last_state(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None, grid: Grid | None = None
    ) -> Float[Tensor, "b s"]:
        """The state after the last real cell, which the paper's classifier reads; 0 where there is none."""
        grid = self._validate(x, None, mask, None, None, grid)
        states = self._states(zero_masked(x, mask), mask, grid)
        if mask is None:
            return states[:, -1]
        places = torch.arange(mask.shape[1], device=x.device).expand_as(mask)
        last = places.masked_fill(~mask, 0).amax(1)
        return zero_masked(states, mask)[torch.arange(len(x), device=x.device), last]

    def _states(self, x: Tensor, mask: Tensor | None, grid: Grid) -> Float[Tensor, "b n s"]:
        spatial, spectral = self._maps(x, mask, grid)
        here, there = self._gates(spatial, grid)
        spatial, spectral = (spatial * here).flatten(1, 2), (spectral * there).flatten(1, 2)
        projected = ((self.q_proj, spatial), (self.k_proj, spectral), (self.v_proj, spectral))
        q, k, v = (rearrange(layer(t), "b n (h d) -> b h n d", h=self.num_heads) for layer, t in projected)
        heads = rearrange(attention(q, k, v, key_mask=mask), "b h n d -> b n (h d)")
        inputs = self.write(heads) + self.transition.bias
        if mask is None:
            return linear_recurrence(inputs, self.transition.weight)
        order = (~mask).long().argsort(dim=1, stable=True).unsqueeze(-1).expand_as(inputs)  # real cells side by side, in front
        states = linear_recurrence(inputs.gather(1, order), self.transition.weight)
        return torch.zeros_like(states).scatter(1, order, states)

    def _maps(self, x: Tensor, mask: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        """The spatial and the spectral map, (b, H, W, C) each."""
        if self.columns not in (None, grid[1]):
            raise ValueError(f"grid: expected {self.columns} columns as the option says, got {grid}")
        image = to_grid(x, grid)
        real = None if mask is None else mask.unflatten(1, grid).unsqueeze(1)
        dilated, eroded = self.spatial(image, real)
        spatial = torch.cat((from_grid(eroded), from_grid(dilated)), -1)
        across = None if real is None else real.permute(0, 3, 1, 2)  # (b, W, 1, H)
        dilated, eroded = self.spectral(image.permute(0, 3, 1, 2), across)
        spectral = torch.cat((eroded, dilated), 2).permute(0, 3, 1, 2).flatten(1, 2)
        maps = (zero_masked(self.embed(t), mask) for t in (spatial, spectral))
        spatial, spectral = (t.unflatten(1, grid) for t in maps)
        return spatial, spectral

    def _gates(self, spatial: Float[Tensor, "b h w c"], grid: Grid) -> tuple[Tensor, Tensor]:
        """The gates of the spatial and the spectral map, to be spread over both axes."""
        height, width = grid
        row = spatial[:, height // 2]
        if self.gate == "centre":
            row = row[:, width // 2 : width // 2 + 1]
        elif self.gate == "transposed" and height != width:
            raise ValueError(f"grid: expected a square with gate='transposed', got {grid}")
        axis = 2 if self.gate == "transposed" else 1
        here, there = (torch.sigmoid(layer(row)).unsqueeze(axis) for layer in (self.spatial_gate, self.spectral_gate))
        return here, there
