"""Metrics of a model on the fixed examples of a task."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from attnlab.models.sampling import evaluating
from attnlab.tasks.contract import Split, Task
from attnlab.training.distributed import Processes


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
    processes: Processes | None = None,
) -> dict[str, float]:
    """Mean metrics of ``model`` over all examples of ``split``, in evaluation mode; the mode is put back afterwards.

    Args:
        model: maps a batch to logits, as `Batch.through` calls it.
        task: examples and metrics.
        split: "valid" or "test".
        batch_size: examples at a time.
        autocast: dtype of mixed precision, or None.
        processes: those that share the work, and all get the same; None is this one alone.
    """
    device, together = device_of(model), processes or Processes()
    own: dict[int, dict[str, tuple[float, float]]] = {}
    sums: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, float] = defaultdict(float)
    with evaluating(model), precision(device, autocast):
        for number, batch in enumerate(task.eval_batches(batch_size, split)):
            if number % together.size == together.rank:
                batch = batch.to(device)
                own[number] = task.metrics(batch.through(model), batch)
    found = {number: metrics for part in together.gather(own) for number, metrics in part.items()}
    for number in sorted(found):  # in their order, so that sums round as those of one process
        for name, (total, count) in found[number].items():
            sums[name] += total
            counts[name] += count
    return {name: sums[name] / counts[name] for name in sums}
