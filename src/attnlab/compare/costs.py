"""What a layer of each mixer costs, read from timing cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnlab.compare.crossover import Crossover, growth, with_interval
from attnlab.compare.ledger import Row
from attnlab.compare.timing import Direction


@dataclass(frozen=True)
class LayerCosts:
    """A timing cell's result; without a passed gate it has no times.

    Args:
        mixer: label.
        causal: which form was measured.
        gate: the gate's record.
        times: for "forward", "training" and, where it streams, "decode" the `attnlab.compare.timing.PairTimes` record at each
            length.
        memory: for the first two the peak bytes at each length that was weighed, None where the system could not tell.
        flops: of matrix products in one forward pass at each length.
        state: bytes of streaming state after so many tokens; None where it does not stream.
        threads: torch's threads while timing.
    """

    mixer: str
    causal: bool
    gate: Mapping[str, Any]
    times: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    memory: dict[str, dict[int, int | None]] = field(default_factory=dict)
    flops: dict[int, int] = field(default_factory=dict)
    state: dict[int, int | None] = field(default_factory=dict)
    threads: int = 0

    @property
    def passed(self) -> bool:
        """Whether the correctness gate passed."""
        return bool(self.gate["passed"])

    def crossover(self, direction: Direction) -> Crossover | None:
        """From which length on it beats softmax attention; None without times."""
        times = self.times.get(direction)
        if not times:
            return None
        ratios, low, high = ([float(record[key]) for record in times.values()] for key in ("ratio", "ratio_from", "ratio_to"))
        return with_interval(list(times), ratios, low, high)

    def exponent(self, direction: Direction) -> float | None:
        """How its time grows with the length over the longer ones; None without times."""
        times = self.times.get(direction, {})
        return growth(list(times), [record["seconds"] for record in times.values()]) if times else None

    def throughput(self, direction: Direction, length: int) -> float | None:
        """Tokens a second of one sequence at a length: of all its tokens, or in "decode" of the next; None without times."""
        record = self.times.get(direction, {}).get(length)
        return None if record is None else (1 if direction == "decode" else length) / record["seconds"]


def read_costs(rows: Sequence[Row]) -> dict[str, LayerCosts]:
    """The costs by mixer, of the timing cells that have finished."""
    return {
        row.member.mixer: costs_of(row.member.mixer, row.result) for row in rows if row.member.role == "timing" and row.result
    }


def costs_of(mixer: str, result: Mapping[str, Any]) -> LayerCosts:
    """The costs in the result of a timing cell."""
    directions = [name for name in ("forward", "training", "decode") if name in result]
    return LayerCosts(
        mixer,
        result["causal"],
        result["gate"],
        {name: _by_length(result[name]) for name in directions},
        {name: _by_length(result[f"{name}_memory"]) for name in directions if f"{name}_memory" in result},
        _by_length(result.get("flops", {})),
        _by_length(result.get("state_bytes", {})),
        result["threads"],
    )


def _by_length(table: Mapping[str, Any]) -> dict[int, Any]:
    return {int(length): value for length, value in sorted(table.items(), key=lambda item: int(item[0]))}


def softmax_seconds(costs: Sequence[LayerCosts], direction: Direction, causal: bool) -> dict[int, float]:
    """Softmax attention's seconds at each length: the median over all pairs' medians of one causality."""
    found: dict[int, list[float]] = {}
    for cost in costs:
        if cost.causal == causal:
            for length, record in cost.times.get(direction, {}).items():
                found.setdefault(length, []).append(float(record["baseline"]))
    return {length: sorted(values)[len(values) // 2] for length, values in sorted(found.items())}
