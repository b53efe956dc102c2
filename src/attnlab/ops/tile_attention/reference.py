"""Tile attention as its formula reads: every tile's keys side by side in memory, autograd's backward."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype


def attend(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m e"],
    queries: Int[Tensor, "#b #h t x"],
    keys: Int[Tensor, "#b #h t y"],
    bias: Float[Tensor, "#h kinds x y"] | None,
    kind: Int[Tensor, "t"] | None,
    causal: bool,
    key_mask: Bool[Tensor, "b m"] | None,
    zero_outside: bool,
    scale: float,
) -> tuple[Float[Tensor, "b h t x e"], Float[Tensor, "b h t x"]]:
    """The oracle; see `attnlab.ops.tile_attention.tile_attention`."""
    wide, group = accumulate_dtype(q.dtype), q.shape[1] // k.shape[1]
    shape = q.shape[:2]
    queries, keys = (index.expand(*shape, -1, -1) for index in (queries, keys))
    if key_mask is not None:
        k, v = (t.masked_fill(~key_mask[:, None, :, None], 0.0) for t in (k, v))
    k, v = (_tokens(t.repeat_interleave(group, dim=1).to(wide), keys) for t in (k, v))
    scores = _tokens(q.to(wide), queries) @ k.mT * scale
    if bias is not None and kind is not None:
        scores = scores + bias.to(wide)[:, kind]
    blocked = torch.zeros_like(scores, dtype=torch.bool)
    if not zero_outside:
        blocked = blocked | (keys < 0).unsqueeze(-2)
    if key_mask is not None:
        real = _tokens(key_mask[:, None, :, None].expand(-1, shape[1], -1, -1), keys).squeeze(-1)
        blocked = blocked | (~real & (keys >= 0)).unsqueeze(-2)
    if causal:
        blocked = blocked | (keys.unsqueeze(-2) > queries.unsqueeze(-1))
    scores = scores.masked_fill(blocked | (queries < 0).unsqueeze(-1), float("-inf"))
    empty = (scores == float("-inf")).all(-1)
    safe = scores.masked_fill(empty.unsqueeze(-1), 0.0)
    lse = safe.logsumexp(-1)
    weights = (safe - lse.unsqueeze(-1)).exp().masked_fill(empty.unsqueeze(-1), 0.0)
    return (weights @ v).to(q.dtype), lse.masked_fill(empty, float("-inf"))


def _tokens(x: Shaped[Tensor, "b h n d"], index: Int[Tensor, "b h t y"]) -> Shaped[Tensor, "b h t y d"]:
    """The tokens at these places, zeros at -1."""
    places = index.clamp(min=0).flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, places).unflatten(2, index.shape[2:]).masked_fill((index < 0).unsqueeze(-1), 0)
