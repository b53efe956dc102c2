"""Softmax over prefixes as its definition reads: one token after the other."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def prefix_softmax(
    scores: Float[Tensor, "b h n"], v: Float[Tensor, "b h n e"], mean: Float[Tensor, "b h e"], lse: Float[Tensor, "b h"]
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """What `attnlab.ops.prefix_softmax` documents, differentiated by autograd through every step."""
    means, lses = [], []
    for score, value in zip(scores.unbind(2), v.unbind(2), strict=True):
        counts = (score > float("-inf")) | (lse > float("-inf"))
        # only finite numbers are subtracted where nothing counted yet, so that no gradient becomes NaN
        known, new = (torch.where(counts, x, 0.0) for x in (lse, score))
        total = torch.where(counts, torch.logaddexp(known, new), float("-inf"))
        shift = torch.where(counts, total, 0.0)
        weight = torch.where(counts, (new - shift).exp(), 0.0).unsqueeze(-1)
        kept = torch.where(counts, (known - shift).exp(), 0.0).unsqueeze(-1)
        mean, lse = kept * mean + weight * value, total
        means.append(mean)
        lses.append(lse)
    return torch.stack(means, 2), torch.stack(lses, 2)
