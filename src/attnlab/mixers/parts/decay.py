"""Schedules of a fixed decay per head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.positions.alibi import alibi_slopes

SCHEDULES = ("alibi", "none")


def log_decay(schedule: str, num_heads: int, layer: int = 0, num_layers: int = 1) -> Float[Tensor, "h"] | None:
    r"""Logarithm of each head's decay a token, $-s_h (1 - l/(L-1) + 10^{-5})$ with ALiBi's slopes $s_h$; None for "none".

    Args:
        schedule: "alibi" or "none".
        num_heads: heads.
        layer: l, from 0; the last layer has almost no decay.
        num_layers: L; 1 leaves the slopes as they are.

    Raises:
        ValueError: for an unknown schedule or a layer outside of 0..L-1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"decay: expected one of {SCHEDULES}, got {schedule!r}")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer: expected 0 to num_layers - 1 = {num_layers - 1}, got {layer}")
    if schedule == "none":
        return None
    factor = 1.0 if num_layers == 1 else 1.0 - layer / (num_layers - 1) + 1e-5
    return torch.tensor([-slope * factor for slope in alibi_slopes(num_heads)])
