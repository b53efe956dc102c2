"""Neighbourhood attention as its formula reads: the mask of all pairs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.neighborhoods import Axis, neighborhood_mask
from attnlab.ops.tile_attention import reference
from attnlab.ops.tile_attention.neighborhood.tiling import table_index


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n e"],
    axes: tuple[Axis, ...],
    bias: Float[Tensor, "#h *offsets"] | None,
    key_mask: Bool[Tensor, "b n"] | None,
    scale: float,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """The oracle; see `attnlab.ops.tile_attention.neighborhood.neighborhood_attention`."""
    term = q.new_zeros(1, q.shape[2], q.shape[2]) if bias is None else bias.flatten(1)[:, _places(axes).to(q.device)]
    term = term.masked_fill(~neighborhood_mask(axes).to(q.device), float("-inf")).unsqueeze(1)
    every = torch.arange(q.shape[2], device=q.device)[None, None, None]
    out, lse = reference.attend(q, k, v, every, every, term, every.new_zeros(1), False, key_mask, False, scale)
    return out.squeeze(2), lse.squeeze(2)


def _places(axes: tuple[Axis, ...]) -> Tensor:
    """Where each pair's bias stands in the table, (n, n)."""
    n = [axis.size for axis in axes]
    cells = torch.cartesian_prod(*(torch.arange(size) for size in n)).view(-1, len(n))
    offsets = torch.stack([axis.offsets()[cells[:, i, None], cells[:, i]] for i, axis in enumerate(axes)], dim=-1)
    windows = [axis.window for axis in axes]
    limits = torch.tensor(windows) - 1
    return table_index(offsets.clamp(-limits, limits).unsqueeze(0), windows).squeeze(0)
