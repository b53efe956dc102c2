"""How many query heads each key head serves, and which key head each query head reads."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.ops.backends import accumulate_dtype


def key_norms(k: Float[Tensor, "b hk m d"], mask: Bool[Tensor, "b m"] | None) -> Float[Tensor, " hk"]:
    r"""$m_g = \sum_b \lVert K_{bg} \rVert_F$ over real tokens, a constant for autograd, in float32 at least."""
    squares = k.detach().to(accumulate_dtype(k.dtype)).square().sum(dim=-1)
    if mask is not None:
        squares = squares.masked_fill(~mask[:, None], 0.0)
    return squares.sum(dim=-1).sqrt().sum(dim=0)


def rounded_shares(weights: Float[Tensor, " g"], total: int) -> Int[Tensor, " g"]:
    """``total`` heads dealt in proportion to ``weights`` and rounded, half to even; equal shares if all weights are 0.

    The sum may miss ``total`` by up to half the number of groups: see `settle_by_size` and `settle_by_draws`.
    """
    sum_ = weights.sum()
    weights = torch.where(sum_ > 0, weights, torch.ones_like(weights))
    return (weights / weights.sum() * total).round().to(torch.int64)


def settle_by_size(sizes: Int[Tensor, " g"], total: int) -> Int[Tensor, " g"]:
    """Sizes that sum to ``total``: one by one the largest loses a head, or the smallest gains one; of equal ones the first."""
    # as many steps as rounding can make necessary; a fixed number, so that it can be compiled and needs no synchronisation
    for _ in range((len(sizes) + 1) // 2):
        step = (total - sizes.sum()).sign()
        # not argmin and argmax of ties, whose choice is the backend's own
        wanted = torch.where(step < 0, sizes.max(), sizes.min())
        first = ((sizes == wanted).cumsum(0) == 1) & (sizes == wanted)
        sizes = sizes + step * first
    return sizes


def settle_by_draws(sizes: Int[Tensor, " g"], total: int, draws: Int[Tensor, " r"]) -> Int[Tensor, " g"]:
    """Sizes that sum to ``total``: group after group of ``draws`` loses or gains a head, an empty one loses none.

    What the draws leave is settled by size.
    """
    places = torch.arange(len(sizes), device=sizes.device)
    for one in draws.unbind():
        step = (total - sizes.sum()).sign()
        sizes = (sizes + step * (places == one)).clamp(min=0)
    return settle_by_size(sizes, total)


def heads_in_order(sizes: Int[Tensor, " g"], total: int) -> Int[Tensor, " h"]:
    """The group of each of ``total`` heads, dealt contiguously: the first ``sizes[0]`` to group 0, and so on."""
    return torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes, output_size=total)
