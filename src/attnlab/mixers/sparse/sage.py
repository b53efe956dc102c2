"""GraphSAGE aggregation: the mean of a sample of neighbours, and the node itself, through a map each."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.core.catalog import mixers
from attnlab.core.contract import Mixer
from attnlab.core.grid import Grid
from attnlab.core.info import Supports
from attnlab.core.masks import Masks
from attnlab.mixers.parts.neighbor_mean import neighbor_mean, sampled


@mixers.register(
    "sage",
    family="sparse",
    paper="tangnn",
    partial=True,
    supports=Supports(pair_mask=True, grid=frozenset({1, 2, 3}), permutation_equivariant=True, cost=2.0),
)
class SageAggregation(Mixer):
    r"""$y_i = W_l\,\mathrm{mean}_{j \in \tilde N(i)}\, x_j + b + W_r x_i$ (Hamilton et al. 2017; the local branch of TANGNN).

    N(i) are the keys that ``pair_mask`` allows, all real tokens without one; in training $\tilde N(i)$ are at most
    ``sample_size`` of them, chosen at random, otherwise all. A mask a head is one for the head's slice of the channels of x_j.
    Time and memory O(n^2) for the mask, time O(n^2 d) on a dense graph.

    Args:
        dim: width of the tokens.
        num_heads: slices of the channels.
        causal: always False.
        sample_size: neighbours in training; None takes all.
        generator: source of the draws.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a sample below 1.
        UnsupportedError: with ``causal=True``.

    Differs from the paper: a node without neighbours is a query without keys, whose output is 0; there its own map is left.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        sample_size: int | None = 5,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        if sample_size is not None and sample_size < 1:
            raise ValueError(f"sample_size: expected at least 1, or None, got {sample_size}")
        self.sample_size, self.generator = sample_size, generator
        self.neighbor_proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.root_proj = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

    def mix(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c2"] | None,
        masks: Masks,
        grid: Grid,
    ) -> Float[Tensor, "b n c"]:
        """Draw if in training, average, map."""
        b, n = x.shape[:2]
        allowed = masks.allowed(n, n, causal=False, device=x.device)
        allowed = x.new_ones(1, 1, 1, 1, dtype=torch.bool) if allowed is None else allowed
        allowed = allowed.expand(b, allowed.shape[1], n, n)
        if self.training and self.sample_size is not None:
            allowed = sampled(allowed, self.sample_size, self.generator)
        self.emit("selection", allowed)
        mean = neighbor_mean(rearrange(x, "b n (h d) -> b h n d", h=self.num_heads), allowed)
        return self.neighbor_proj(rearrange(mean, "b h n d -> b n (h d)")) + self.root_proj(x)
