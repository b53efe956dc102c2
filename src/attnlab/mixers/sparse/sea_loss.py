"""What SEA's layers learn from the attention that they replace."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def distillation_loss(
    estimated: Float[Tensor, "b h n m"],
    dense: Float[Tensor, "b h n m"],
    teacher: Float[Tensor, "b h n m"],
    allowed: Bool[Tensor, "#b 1 n m"],
    *,
    sum_heads: bool,
) -> Float[Tensor, ""]:
    r"""$\sum_s 0.1\,\mathrm{KL}(A \Vert \mathrm{softmax}\, s) + \mathrm{MSE}(A, \mathrm{softmax}\, s)$ over two scores s.

    Args:
        estimated: the estimate, resized to all keys.
        dense: the student's own products of queries and keys.
        teacher: the teacher's logits, A is their softmax.
        allowed: pairs of real tokens, and of the past if causal.
        sum_heads: divide the divergence by the number of queries alone, not by that of heads too.
    """
    lowest = torch.finfo(teacher.dtype).min
    target = teacher.masked_fill(~allowed, lowest).log_softmax(-1)
    weight = target.exp() * allowed
    heads = teacher.shape[1]
    rows = allowed.any(-1).expand(len(teacher), -1, -1).sum()
    # The mean is over all pairs of real tokens, those of the future too, where both maps are 0.
    pairs = allowed.any(-1).expand(len(teacher), -1, -1).sum(-1).square().sum() * heads
    total = teacher.new_zeros(())
    for scores in (estimated, dense):
        log = scores.masked_fill(~allowed, lowest).log_softmax(-1)
        divergence = (weight * (target - log).masked_fill(~allowed, 0.0)).sum() / rows.clamp(min=1)
        gaps = ((log.exp() - target.exp()) * allowed).square().sum() / pairs.clamp(min=1)
        total = total + 0.1 * (divergence if sum_heads else divergence / heads) + gaps
    return total


def context_loss(
    out: Float[Tensor, "b n c"], teacher: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None
) -> Float[Tensor, ""]:
    """The mean square of what is missing to the teacher's head outputs, over real tokens."""
    if mask is None:
        return F.mse_loss(out, teacher)
    gaps = (out - teacher).masked_fill(~mask.unsqueeze(-1), 0.0)
    return gaps.square().sum() / (mask.sum().clamp(min=1) * out.shape[2])
