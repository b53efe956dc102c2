"""Learning rates over the steps as Long Range Arena published them (Tay et al. 2020), steps counted from 0."""

from __future__ import annotations

import math


def rsqrt_factor(step: float | int, warmup: int) -> float:
    r"""$\min(1, s/w)\,/\sqrt{\max(s, w)}$: a linear rise to $1/\sqrt{w}$, then a fall with the inverse square root.

    Args:
        step: s, the step about to be done; at 0 the rate is 0.
        warmup: w, steps of the rise.
    """
    return min(1.0, step / warmup) / math.sqrt(max(step, warmup))


def cosine_cycle_factor(step: float | int, warmup: int, cycle: int) -> float:
    r"""$\min(1, s/w)\,\frac12(1 + \cos(\pi\,\mathrm{frac}(\max(0, s - w)/c)))$: a rise, then half cosines that begin again.

    Args:
        step: s, the step about to be done.
        warmup: w, steps of the rise.
        cycle: c, steps of a half cosine.
    """
    done = max(0, step - warmup) / cycle % 1.0
    return min(1.0, step / warmup) * 0.5 * (1.0 + math.cos(math.pi * done))
