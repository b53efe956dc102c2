"""Who computes which tile of the keys: all tiles of a ragged batch on one line, dealt evenly (stream-K), and the alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """Tiles ``start`` to ``stop`` of the keys of output ``output`` (an example and key head)."""

    output: int
    start: int
    stop: int


Plan = list[list[Segment]]
"""The segments of each worker, in order."""


def tiles_of(lengths: Sequence[int], tile: int) -> list[int]:
    """How many tiles of ``tile`` keys each output has."""
    if tile < 1:
        raise ValueError(f"tile: expected at least 1, got {tile}")
    return [-(-length // tile) for length in lengths]


def stream_k(tiles: Sequence[int], workers: int) -> Plan:
    """All tiles on one line, worker g taking those from floor(g T / G) to floor((g + 1) T / G): no two differ by more than one.

    A worker may end one output and begin the next; an output cut in pieces is merged afterwards (Lean Attention).
    """
    _check_workers(workers)
    total, plan = sum(tiles), []
    starts = [sum(tiles[:output]) for output in range(len(tiles))]
    for worker in range(workers):
        first, last = worker * total // workers, (worker + 1) * total // workers
        plan.append(
            [
                Segment(output, max(first, start) - start, min(last, start + count) - start)
                for output, (start, count) in enumerate(zip(starts, tiles, strict=True))
                if max(first, start) < min(last, start + count)
            ]
        )
    return plan


def fixed_split(tiles: Sequence[int], workers: int, parts: int) -> Plan:
    """Every output in ``parts`` parts of equal tiles, dealt in turn (Flash-Decoding)."""
    _check_workers(workers)
    if parts < 1:
        raise ValueError(f"parts: expected at least 1, got {parts}")
    plan: Plan = [[] for _ in range(workers)]
    pieces = [
        Segment(output, part * count // parts, (part + 1) * count // parts)
        for output, count in enumerate(tiles)
        for part in range(parts)
    ]
    for turn, piece in enumerate(piece for piece in pieces if piece.start < piece.stop):
        plan[turn % workers].append(piece)
    return plan


def no_split(tiles: Sequence[int], workers: int) -> Plan:
    """Every output whole, dealt in turn (FlashAttention-2's decode)."""
    return fixed_split(tiles, workers, 1)


def makespan(plan: Plan) -> int:
    """Tiles of the busiest worker: the time of the whole, if a tile takes one unit and merging none."""
    return max(sum(piece.stop - piece.start for piece in pieces) for pieces in plan)


def occupancy(plan: Plan) -> float:
    """Share of the workers' time that is used: all tiles over workers times `makespan`."""
    longest = makespan(plan)
    return sum(piece.stop - piece.start for pieces in plan for piece in pieces) / (longest * len(plan)) if longest else 1.0


def _check_workers(workers: int) -> None:
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
