"""Training and evaluation of a model on a task."""

from __future__ import annotations

from attnlab.training.evaluation import evaluate
from attnlab.training.loop import train
from attnlab.training.result import LogRow, Status, TrainResult

__all__ = ["LogRow", "Status", "TrainResult", "evaluate", "train"]
