"""Sequence parallelism in one process: all ranks one after the other, up to where they exchange something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from attnlab.core.contract import Mixer
from attnlab.parallel.mixer import SequenceParallel
from attnlab.parallel.model import parts_of, restore, spread
from attnlab.parallel.ranks import Traffic
from attnlab.parallel.simulation import SimulatedRanks


def simulate(
    module: nn.Module,
    pieces: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None = None,
    *,
    traffic: Traffic | None = None,
) -> list[Tensor]:
    """What ranks would give that hold these pieces of a sequence: the code that runs between processes, without any.

    Autograd sees one graph, and parameters get the gradients of the whole sequence.

    Args:
        module: a mixer, or a model as `parallelize` takes it.
        pieces: of the sequence, in order, (batch, n, ...) each; n >= 1 may differ.
        masks: for each piece a mask (batch, n), True marks a real token, or None.
        traffic: counts what all ranks together would send forward, if given.

    Returns:
        The output of every rank.

    Raises:
        ValueError: for no piece, or masks that are not as many; and what `SequenceParallel` raises.
        UnsupportedError: as for `sequence_parallel` and `parallelize`.
    """
    if not pieces:
        raise ValueError("pieces: expected at least one, got none")
    masks = [None] * len(pieces) if masks is None else masks
    if len(masks) != len(pieces):
        raise ValueError(f"masks: expected {len(pieces)}, one a piece, got {len(masks)}")
    ranks: SimulatedRanks[Tensor] = SimulatedRanks(len(pieces), traffic)
    if isinstance(module, Mixer):
        return ranks.run(_works(SequenceParallel(module, ranks), pieces, masks))
    spread(module, parts_of(module), ranks)
    try:
        return ranks.run(_works(module, pieces, masks))
    finally:
        restore(module)


def _works(module: nn.Module, pieces: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Callable[[], Tensor]]:
    return [
        partial(module, piece) if mask is None else partial(module, piece, mask=mask)
        for piece, mask in zip(pieces, masks, strict=True)
    ]
