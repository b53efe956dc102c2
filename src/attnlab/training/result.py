"""What a training run reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["finished", "diverged", "time_limit"]


@dataclass(frozen=True)
class LogRow:
    """One logged step.

    Args:
        step: steps done so far, from 1.
        loss: mean training loss in nats since the last row.
        learning_rate: rate of this step.
        gradient_norm: global norm of this step's gradient before clipping.
        seconds: training time so far.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Args:
        status: "finished", "diverged" (a loss or gradient was not finite; training stopped there), or "time_limit".
        steps: optimiser steps done.
        history: logged steps, in order.
        metrics: the metrics of the final evaluation; empty if it diverged or none was asked for.
        seconds: training time, evaluation excluded, resumed parts included.
        tokens_per_second: input tokens trained on per second of it.
    """

    status: Status
    steps: int
    history: list[LogRow] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    tokens_per_second: float = 0.0
