"""A measured number with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnlab.compare.statistics import mean_interval


@dataclass(frozen=True)
class Quantity:
    """A mean with the 95 % interval that its repetitions give.

    Args:
        mean: over the repetitions.
        low: lower end of the interval; None where one value, or a count without spread, gives none.
        high: upper end.
        count: repetitions: seeds, draws or passes.
        unit: what the number counts, empty for a share or a ratio.
    """

    mean: float
    low: float | None
    high: float | None
    count: int
    unit: str = ""

    def __post_init__(self) -> None:
        numbers = [number for number in (self.mean, self.low, self.high) if number is not None]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"quantity: expected finite numbers, got {numbers}")

    @property
    def text(self) -> str:
        """``"0.9971 (0.9963 to 0.9979, n = 3)"``, the shares of an interval with its ends."""
        unit = f" {self.unit}" if self.unit else ""
        if self.low is None or self.high is None:
            return f"{self.mean:.4g}{unit} (n = {self.count})"
        return f"{self.mean:.4g}{unit} ({self.low:.4g} to {self.high:.4g}, n = {self.count})"

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "count": self.count, "unit": self.unit}


def over(values: Sequence[float], *, resolution: float = 0.0, unit: str = "") -> Quantity:
    """Mean and interval of repetitions; ``resolution`` is the step in which the values come."""
    interval = mean_interval(values, resolution)
    return Quantity(interval.mean, interval.low, interval.high, interval.count, unit)


@dataclass(frozen=True)
class Measured:
    """What a runnable gives.

    Args:
        quantities: the numbers that conditions read, by name.
        details: the rest, as JSON can hold it.
    """

    quantities: Mapping[str, Quantity]
    details: Mapping[str, Any] = field(default_factory=dict)
