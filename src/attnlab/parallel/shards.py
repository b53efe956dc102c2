"""Pieces of a sequence for the ranks, and the whole again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from attnlab.parallel.processes import ProcessRanks


def even_lengths(n: int, size: int) -> list[int]:
    """n tokens over ``size`` ranks, the first ones with one more where it does not divide.

    Raises:
        ValueError: for fewer tokens than ranks.
    """
    if n < size:
        raise ValueError(f"x: expected at least a token for each of {size} ranks, got {n}")
    return [n // size + (rank < n % size) for rank in range(size)]


def split(x: Tensor, group: dist.ProcessGroup | None = None, *, lengths: Sequence[int] | None = None, dim: int = 1) -> Tensor:
    """This rank's piece of ``x``, which every rank holds whole: tokens, a mask, or targets.

    Args:
        x: (batch, n, ...).
        group: of torch.distributed; None is all processes.
        lengths: tokens of every rank; None is as even as can be.
        dim: along which the tokens lie.

    Raises:
        RuntimeError: without a process group.
        ValueError: for lengths that are not as many as ranks, not positive, or of another sum than n.
    """
    ranks = ProcessRanks(group)
    n = x.shape[dim]
    lengths = even_lengths(n, ranks.size) if lengths is None else list(lengths)
    if len(lengths) != ranks.size or min(lengths) < 1 or sum(lengths) != n:
        raise ValueError(f"lengths: expected {ranks.size} positive numbers, one a rank, of sum {n}, got {lengths}")
    return x.split(lengths, dim)[ranks.rank]


@torch.no_grad()
def gather(y: Tensor, group: dist.ProcessGroup | None = None, *, dim: int = 1) -> Tensor:
    """The whole of what ranks hold in pieces, on every rank; to look at, no gradient flows back.

    Args:
        y: this rank's piece, (batch, n, ...); n may differ between ranks.
        group: of torch.distributed; None is all processes.
        dim: along which the tokens lie.

    Raises:
        RuntimeError: without a process group.
    """
    return torch.cat([piece for (piece,) in ProcessRanks(group).gather("gather", [y], uneven=True).pieces], dim)
