"""Relative position by buckets of distance: fine near by, logarithmic farther off."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.core.grid import Grid
from attnlab.ops.attention import Pairwise
from attnlab.positions.base import Position, offsets_between, positions


def log_buckets(offsets: Int[Tensor, "r"], num_buckets: int, max_distance: int, *, causal: bool) -> Int[Tensor, "r"]:
    r"""The bucket of each key position minus query position (Raffel et al. 2020, section 2.1).

    Half of the buckets are for keys behind the query and half for those ahead, or all for those behind where causal. Of a
    side's B buckets the first B / 2 hold one distance each; distance $\delta$ beyond goes to
    $B/2 + \lfloor \log(2\delta/B) / \log(2\,\mathrm{max}/B) \cdot B/2 \rfloor$, at most B - 1.
    """
    side = num_buckets if causal else num_buckets // 2
    ahead = torch.zeros_like(offsets) if causal else (offsets > 0).long() * side
    distance = (-offsets).clamp(min=0) if causal else offsets.abs()
    exact = max(side // 2, 1)
    spread = math.log(max_distance / exact) / max(side - exact, 1)
    far = exact + ((distance.clamp(min=1).double() / exact).log() / spread).long()
    return ahead + torch.where(distance < exact, distance, far.clamp(max=side - 1))


@positions.register("buckets", family="bias")
class BucketedPosition(Position):
    r"""T5's relative position: a learned scalar a head and bucket of distances (Raffel et al. 2020, section 2.1).

    $$b_{hij} = t_{h,\,\mathrm{bucket}(j - i)}$$

    Args:
        num_heads: heads, each with its own scalars.
        head_dim: width of a query; not used.
        num_buckets: how many scalars a head has.
        max_distance: from which distance on all share the last bucket.

    Raises:
        ValueError: for fewer than 4 buckets, or a distance within those that have a bucket of their own.
    """

    def __init__(self, num_heads: int, head_dim: int, *, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__(num_heads, head_dim)
        if num_buckets < 4 or num_buckets % 2:
            raise ValueError(f"num_buckets: expected an even number of at least 4, got {num_buckets}")
        if max_distance <= num_buckets // 2:
            raise ValueError(f"max_distance: expected more than num_buckets / 2 = {num_buckets // 2}, got {max_distance}")
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.table = nn.Parameter(torch.randn(num_heads, num_buckets) * 0.02)

    def bias(self, q: Float[Tensor, "b h n d"], num_keys: int, *, causal: bool, grid: Grid | None) -> Pairwise:
        """The scalars by offset."""
        offsets = offsets_between(q.shape[2], num_keys, q.device)
        buckets = log_buckets(offsets, self.num_buckets, self.max_distance, causal=causal)
        table: Tensor = self.table.to(q.dtype)[:, buckets]
        return Pairwise(offsets=table)
