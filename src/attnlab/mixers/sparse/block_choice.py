"""Which blocks of keys each query uses: a number of them, or a share of the similarity within a query, a head or an example."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

SCOPES = ("query", "head", "example", "block")
"""Among which pairs of query and block choices compete: those of a query, a head, all heads, or of one block."""

_AXES = {"query": ((1, 2), (3,)), "head": ((1,), (2, 3)), "example": ((), (1, 2, 3)), "block": ((3,), (1, 2))}


@torch.no_grad()
def choose_blocks(
    scores: Float[Tensor, "b h n c"],
    own: Bool[Tensor, "b h n c"],
    usable: Bool[Tensor, "b h n c"],
    *,
    scope: str,
    top_k: int | None = None,
    threshold: float = 0.0,
) -> Bool[Tensor, "b h n c"]:
    r"""The pairs of query and block that are attended to, each query's own block always among them.

    With ``top_k`` = k the best k of each query, own block included, or the best k n pairs of a scope of n queries. With a
    threshold $\tau$, for scores scaled to $g \in [0, 1]$ within the scope, G their sum and $G_{own}$ that of own blocks: the
    fewest further pairs, best first and at least one, whose g add up to $\max(0, \tau - G_{own} / G)\, G$.

    Args:
        scores: of each query and block.
        own: True at the block that a query stands in.
        usable: True at pairs that may be chosen.
        scope: one of `SCOPES`; "block" with a threshold alone.
        top_k: k; None for a threshold.
        threshold: $\tau$.
    """
    kept_axes, axes = _AXES[scope]
    order = (0, *kept_axes, *axes)
    b, sizes = len(scores), [scores.shape[axis] for axis in order]
    flat = (*sizes[: 1 + len(kept_axes)], -1)

    def rows(x: Tensor) -> Tensor:
        return x.permute(order).reshape(flat)

    score, mine, valid = rows(scores), rows(own & usable), rows(usable)
    if top_k is None:
        chosen = _share(score, mine, valid, threshold)
    else:
        competing = score.masked_fill(mine, float("inf")).masked_fill(~valid, float("-inf"))
        if scope == "query":
            best = competing.topk(min(top_k, competing.shape[-1]), dim=-1).indices
            chosen = torch.zeros_like(valid).scatter(-1, best, True) & valid
        else:  # as many as k a query, of the queries that have a block at all
            queries = rows(usable.any(-1, keepdim=True).expand_as(usable))
            chosen = _best(competing, top_k * queries.sum(-1, True) / scores.shape[-1]) & valid
    inverse = sorted(range(4), key=lambda axis: order[axis])
    return chosen.reshape(b, *sizes[1:]).permute(inverse) | (own & usable)


def _best(scores: Float[Tensor, "*s m"], number: Float[Tensor, "*s 1"]) -> Bool[Tensor, "*s m"]:
    """The ``number`` largest of each row."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, rank < number)


def _share(
    scores: Float[Tensor, "*s m"], own: Bool[Tensor, "*s m"], valid: Bool[Tensor, "*s m"], threshold: float
) -> Bool[Tensor, "*s m"]:
    """See `choose_blocks`."""
    low = scores.masked_fill(~valid, float("inf")).amin(-1, keepdim=True)
    span = scores.masked_fill(~valid, float("-inf")).amax(-1, keepdim=True) - low
    scaled = ((scores - low) / torch.where(span > 1e-6, span, 1.0)).masked_fill(~valid, 0.0)
    total = scaled.sum(-1, keepdim=True) + 1e-6
    needed = (threshold - scaled.masked_fill(~own, 0.0).sum(-1, keepdim=True) / total).clamp(min=0.0)
    found = scaled.masked_fill(own | ~valid, -1.0).sort(dim=-1, descending=True, stable=True)
    before = F.pad(found.values.clamp(min=0.0).cumsum(-1)[..., :-1], (1, 0)) / total
    first = torch.arange(scores.shape[-1], device=scores.device) == 0
    kept = ((before < needed) | first) & (found.values >= 0.0)
    return torch.zeros_like(valid).scatter(-1, found.indices, kept)
