"""Segments of sequences that have padding of their own: real tokens first, and the last of them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from attnlab.ops.neural_memory import Alignment


def real_first(mask: Bool[Tensor, "b n"]) -> Alignment:
    """Slots for the real tokens of every example, one behind the other from 0 on."""
    begin = torch.zeros(mask.shape[0], dtype=torch.int64, device=mask.device)
    return Alignment.of(begin, mask, mask.shape[1], 1)


def last_real(
    x: Shaped[Tensor, "b n *c"], real: Bool[Tensor, "b n"], count: int
) -> tuple[Shaped[Tensor, "b k *c"], Bool[Tensor, "b k"]]:
    """The last ``count`` real tokens of each example at the end, zeros and False before where there are fewer."""
    order = real.to(torch.int8).argsort(dim=1, stable=True)[:, x.shape[1] - count :]
    found = real.gather(1, order)
    shape = (*order.shape, *[1] * (x.dim() - 2))
    return x.gather(1, order.view(shape).expand(-1, -1, *x.shape[2:])).masked_fill(~found.view(shape), 0.0), found


def flags(real: Bool[Tensor, "b n"] | None, before: Bool[Tensor, "b m"], kept: int, n: int) -> Bool[Tensor, "b k"] | None:
    """Which of ``kept`` earlier and ``n`` new tokens are real; None for all.

    Args:
        real: of the new ones, None for all.
        before: of the earlier ones, (b, 0) as long as all were real.
        kept: earlier tokens.
        n: new tokens.
    """
    if real is None and not before.shape[1]:
        return None
    past = before if before.shape[1] == kept else before.new_ones(before.shape[0], kept)
    return torch.cat((past, before.new_ones(before.shape[0], n) if real is None else real), 1)
