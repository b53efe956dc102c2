"""Rules that choose keys without training, of the Sparse Frontier's comparison: blocks, columns and diagonals, pages, caches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.mixers.parts.selection import top_k

INF = float("inf")


def block_sparsity(num_blocks: int, chosen: int) -> float:
    """The share of the blocks on and below the diagonal that is left out where each block of queries keeps ``chosen``."""
    chosen = min(chosen, num_blocks)
    kept = chosen * (chosen + 1) // 2 + (num_blocks - chosen) * chosen
    return 1 - kept / (num_blocks * (num_blocks + 1) // 2)


def blocks_for(num_blocks: int, sparsity: float) -> int:
    """The fewest blocks, at least 3, that leave out no more than this share."""
    return next((k for k in range(3, num_blocks) if block_sparsity(num_blocks, k) <= sparsity), max(3, num_blocks))


def ranked_blocks(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h t d"],
    count: int,
    real: Bool[Tensor, "b t"] | None = None,
    *,
    later: bool = False,
) -> Int[Tensor, "b h t c"]:
    """The key blocks of each query block, by products of means, -1 for none.

    The first, the own and the one before are taken before all others; later ones never, or, with ``later``, as earlier ones.

    Args:
        q: means of query blocks.
        k: means of key blocks, one for each query head.
        count: blocks that a query block keeps.
        real: which key blocks have any real token.
        later: whether key blocks behind the query block are among them.
    """
    place = torch.arange(q.shape[2], device=q.device)
    behind = place[:, None] - place
    scores = q @ k.mT
    allowed = behind >= (-len(place) if later else 0)
    allowed = (allowed if real is None else allowed & real[:, None, None]).expand_as(scores)
    forced = (place == 0) | (behind == 0) | ((behind.abs() if later else behind) == 1)
    return top_k(scores.masked_fill(forced, INF), count, allowed)


def line_scores(
    weights: Float[Tensor, "b h a n"], places: Int[Tensor, "b a"], *, first: int = 0
) -> tuple[Float[Tensor, "b h n"], Float[Tensor, "b h r"]]:
    """What some queries give each column (a key) and each diagonal (how far back a key is), as shares of the whole.

    Args:
        weights: the queries' attention to all keys.
        places: where these queries stand, -1 for none, whose weights are 0.
        first: the first diagonal, below 0 for keys behind their query; the last one is n - 1.
    """
    n = weights.shape[-1]
    number = (places >= 0).sum(-1).clamp(min=1).to(weights.dtype)[:, None, None]
    back = (places[:, :, None] - torch.arange(n, device=places.device) - first).clamp(min=0)
    back = back[:, None].expand(-1, weights.shape[1], -1, -1).flatten(2)
    diagonals = weights.new_zeros(*weights.shape[:2], n - first).scatter_add(-1, back, weights.flatten(2))
    return weights.sum(2) / number, diagonals / number


def ranked_lines(
    scores: Float[Tensor, "b h n"],
    forced: Bool[Tensor, "#b n"],
    count: int,
    *,
    mass: float | None = None,
    least: int = 0,
) -> Int[Tensor, "b h c"]:
    """The columns or diagonals with the largest scores, forced ones first, -1 for none; those without a score are none.

    Args:
        scores: shares of the attention.
        forced: which are taken in any case.
        count: how many at most.
        mass: stop where the largest scores add up to more than this; None takes ``count``.
        least: but not before so many.
    """
    forced = forced[:, None]
    chosen = top_k(scores.masked_fill(forced, INF), count, forced | (scores > 0))
    if mass is None:
        return chosen
    enough = (scores.sort(dim=-1, descending=True).values.cumsum(-1) <= mass).sum(-1, keepdim=True) + 1
    rank = torch.arange(chosen.shape[-1], device=scores.device)
    return chosen.masked_fill(rank >= enough.clamp(min=least), -1)


def page_bounds(k: Float[Tensor, "b h n d"], page: int, real: Bool[Tensor, "b n"] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest element of the real keys of each complete page, (b, h, t, d), and whether it has any, (b, t)."""
    count = k.shape[2] // page
    keys = k[:, :, : count * page].unflatten(2, (count, page))
    if real is None:
        return keys.amin(3), keys.amax(3), k.new_ones(k.shape[0], count, dtype=torch.bool)
    real = real[:, : count * page].unflatten(1, (count, page))
    some, absent = real.any(-1), ~real[:, None, :, :, None]
    empty = ~some[:, None, :, None]
    low = keys.masked_fill(absent, INF).amin(3).masked_fill(empty, 0.0)
    return low, keys.masked_fill(absent, -INF).amax(3).masked_fill(empty, 0.0), some


def page_scores(
    q: Float[Tensor, "b h n d"], low: Float[Tensor, "b hk t d"], high: Float[Tensor, "b hk t d"], *, share: bool = False
) -> Float[Tensor, "b h n t"]:
    r"""$\sum_c \max(q_c\, \mathrm{low}_c, q_c\, \mathrm{high}_c)$, above the product with any key of the page.

    Args:
        q: queries.
        low: the smallest elements of a page's keys.
        high: the largest.
        share: queries that share keys share pages: their scores are added up.
    """
    q = q.unflatten(1, (low.shape[1], -1))
    # the larger product is that with high where q is positive and that with low elsewhere
    scores = q.clamp(min=0) @ high.mT.unsqueeze(2) + q.clamp(max=0) @ low.mT.unsqueeze(2)
    if share:
        scores = scores.sum(2, keepdim=True).expand_as(scores)
    return scores.flatten(1, 2)


def cache_importance(weights: Float[Tensor, "b h g w n"], kernel: int, *, largest: bool) -> Float[Tensor, "b h n"]:
    """How much the last queries of each key head's group look at each key, averaged over ``kernel`` neighbours.

    Args:
        weights: their attention; g query heads share keys.
        kernel: odd; what is beyond the ends counts as zeros.
        largest: over group and queries the largest weight (Ada-SnapKV), or the sum over queries of the mean (SnapKV).
    """
    found = weights.amax((2, 3)) if largest else weights.mean(2).sum(2)
    return F.avg_pool1d(found, kernel, 1, kernel // 2)


def cache_capacities(
    scores: Float[Tensor, "b h n"], capacity: int, least: int
) -> tuple[Int[Tensor, "b h c"], Int[Tensor, "b h"]]:
    """What each head keeps where ``capacity`` a head is shared out: ``least`` of its own, the rest to the largest of all heads.

    Returns:
        Places in order, -1 behind them, and how many there are of each head.
    """
    b, h, n = scores.shape
    capacity, least = min(capacity, n), min(least, capacity, n)
    own = scores.topk(least, dim=-1).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, own, True)
    rest = scores.masked_fill(kept, -INF).flatten(1).topk(h * (capacity - least), dim=-1).indices
    kept = kept.flatten(1).scatter(-1, rest, True).view(b, h, n)
    most = min(n, least + h * (capacity - least))
    place = torch.arange(n, device=scores.device).masked_fill(~kept, n).sort(dim=-1).values[..., :most]
    return place.masked_fill(place == n, -1), kept.sum(-1)
