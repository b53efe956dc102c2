"""Neighbourhood attention as its formula reads: the mask of all pairs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlab.ops.neighborhood.rules import Axis, neighborhood_mask
from attnlab.ops.neighborhood.tiling import table_index
from attnlab.ops.partial_attention import reference


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n e"],
    axes: tuple[Axis, ...],
    bias: Float[Tensor, "#h *offsets"] | None,
    key_mask: Bool[Tensor, "b n"] | None,
    scale: float,
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """The oracle; see `attnlab.ops.neighborhood.neighborhood_attention`."""
    allowed = neighborhood_mask(axes).to(q.device)[None, None]
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
        k, v = (t.masked_fill(~key_mask[:, None, :, None], 0.0) for t in (k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    term = None if bias is None else bias.flatten(1)[:, _places(axes).to(q.device)][None]
    return reference.partial_attention(q, k, v, scale=scale, bias=term, allowed=allowed)


def _places(axes: tuple[Axis, ...]) -> Tensor:
    """Where each pair's bias stands in the table, (n, n)."""
    n = [axis.size for axis in axes]
    cells = torch.cartesian_prod(*(torch.arange(size) for size in n)).view(-1, len(n))
    offsets = torch.stack([axis.offsets()[cells[:, i, None], cells[:, i]] for i, axis in enumerate(axes)], dim=-1)
    windows = [axis.window for axis in axes]
    limits = torch.tensor(windows) - 1
    return table_index(offsets.clamp(-limits, limits).unsqueeze(0), windows).squeeze(0)
