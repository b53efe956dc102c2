"""Attention rollout: maps of several layers as one, residuals included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def rollout(maps: Sequence[Float[Tensor, "b h n n"]], *, identity: float = 0.5) -> Float[Tensor, "b n n"]:
    r"""$\bar S_L \bar S_{L-1} \cdots \bar S_1$ with $\bar S_l = (1 - a)\, S_l + a I$ (Abnar and Zuidema 2020).

    $S_l$ is the mean over the heads of layer l's self-attention; later layers multiply from the left, so that row i says how much
    of each input token has reached token i. Time O(L n^3).

    Args:
        maps: weights of the layers, the first layer first.
        identity: a, the share of the residual.

    Raises:
        ValueError: for no map, one that is not square, or a share outside [0, 1].
    """
    if not maps:
        raise ValueError("maps: expected at least one layer, got none")
    if not 0 <= identity <= 1:
        raise ValueError(f"identity: expected 0 to 1, got {identity}")
    total: Tensor | None = None
    for one in maps:
        if one.dim() != 4 or one.shape[2] != one.shape[3]:
            raise ValueError(f"maps: expected self-attention (b, h, n, n), got shape {tuple(one.shape)}")
        eye = torch.eye(one.shape[2], device=one.device, dtype=one.dtype)
        step = (1 - identity) * one.mean(dim=1) + identity * eye
        total = step if total is None else step @ total
    if total is None:
        raise ValueError("maps: expected at least one layer, got none")
    return total
