"""The optimiser and its learning rate over the steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from attnlab.training.rates import cosine_cycle_factor, rsqrt_factor

SCHEDULES = ("cosine", "constant", "rsqrt", "cosine_cycle")
"""What the learning rate does after its rise."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; vectors, scalars and what carries ``_no_weight_decay = True`` without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decays = [parameter.dim() > 1 and not getattr(parameter, "_no_weight_decay", False) for parameter in trained]
    groups = []
    for decay, rate in ((True, weight_decay), (False, 0.0)):
        chosen = [parameter for parameter, own in zip(trained, decays, strict=True) if own == decay]
        if chosen:
            groups.append({"params": chosen, "weight_decay": rate})
    return groups


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with betas 0.9 and 0.98, fused where the parameters allow it."""
    real = all(parameter.is_floating_point() for parameter in model.parameters())
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=real or None)


def rate_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Learning rate of ``step`` (from 0) over the peak: a linear rise, then what the schedule says.

    "cosine" falls by half a cosine to 0.001 and "constant" stays; both rise to the peak in their first steps. "rsqrt" and
    "cosine_cycle" are those of `attnlab.training.rates`, which begin at 0; the half cosine of the latter is ``steps`` long.

    Args:
        step: the step about to be done.
        steps: steps in all.
        warmup: share of the steps in which it rises.
        schedule: one of `SCHEDULES`.
    """
    rise = max(1, round(warmup * steps))
    if schedule == "rsqrt":
        return math.sqrt(rise) * rsqrt_factor(step, rise)
    if schedule == "cosine_cycle":
        return cosine_cycle_factor(step, rise, steps)
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    done = (step - rise) / max(1, steps - rise)
    return 0.001 + 0.999 * 0.5 * (1.0 + math.cos(math.pi * done))
