"""Training and evaluation of a model on a task."""

from __future__ import annotations

from attnlab.training.loop import evaluate, train
from attnlab.training.result import LogRow, Status, TrainResult

__all__ = ["LogRow", "Status", "TrainResult", "evaluate", "train"]
