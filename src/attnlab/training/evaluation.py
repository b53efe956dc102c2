"""Metrics of a model on the fixed examples of a task."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from attnlab.models.sampling import evaluating
from attnlab.tasks.contract import Split, Task


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of ``model`` are."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Mixed precision in ``dtype``, or nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def evaluate(
    model: nn.Module,
    task: Task,
    split: Split = "valid",
    *,
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Mean metrics of ``model`` over all examples of ``split``, in evaluation mode; the mode is put back afterwards.

    Args:
        model: maps a batch to logits, as `Batch.through` calls it.
        task: examples and metrics.
        split: "valid" or "test".
        batch_size: examples at a time.
        autocast: dtype of mixed precision, or None.
    """
    device = device_of(model)
    sums: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, float] = defaultdict(float)
    with evaluating(model), precision(device, autocast):
        for batch in task.eval_batches(batch_size, split):
            batch = batch.to(device)
            for name, (total, count) in task.metrics(batch.through(model), batch).items():
                sums[name] += total
                counts[name] += count
    return {name: sums[name] / counts[name] for name in sums}
