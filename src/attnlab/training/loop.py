"""The training loop: AdamW, warm-up and cosine decay, clipping, logging, checkpoints that resume bit-equal."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from attnlab.tasks.contract import Split, Task
from attnlab.training.distributed import Processes
from attnlab.training.evaluation import evaluate
from attnlab.training.result import LogRow, TrainResult
from attnlab.training.run import Recipe, Run


def train(
    model: nn.Module,
    task: Task,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    schedule: str = "cosine",
    seed: int = 0,
    clip: float | None = 1.0,
    autocast: torch.dtype | None = None,
    auxiliary: Mapping[str, float] | None = None,
    accumulate: int = 1,
    log_every: int = 20,
    callback: Callable[[LogRow], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    time_limit: float | None = None,
    eval_split: Split | None = "valid",
    eval_batch_size: int = 64,
    accelerator: Any = None,
) -> TrainResult:
    """Train ``model`` in place, where its parameters are; a loss or gradient that is not finite ends it, without an exception.

    Args:
        model: maps a batch to logits, as `Batch.through` calls it.
        task: batches, loss and metrics.
        steps: optimiser steps in all.
        batch_size: examples a step.
        learning_rate: peak rate.
        weight_decay: AdamW's; not applied to vectors, nor to parameters that carry ``_no_weight_decay = True``.
        warmup: share of ``steps`` over which the rate rises linearly.
        schedule: "cosine" down to a thousandth of the peak, "constant", "rsqrt" (falling with the inverse square root of the
            step) or "cosine_cycle" (half a cosine down to 0 over ``steps`` after the rise).
        seed: of the training batches and of what the model draws; torch's own generators are left as they were.
        clip: global gradient norm to clip to, or None.
        autocast: dtype of mixed precision, or None.
        auxiliary: weights of losses that the model's parts emit, by name: ``{"balance_loss": 0.01}`` for routers.
        accumulate: pieces that each process's examples of a step are run in, one after the other; the step is that of all.
        log_every: steps between rows of the history.
        callback: called with each row as it is logged, in the main process.
        checkpoint: a file, written at the time limit and the end; if it is there training goes on from it, on CPU bit-equal.
        checkpoint_every: steps between further checkpoints.
        time_limit: seconds after which this call stops with status "time_limit".
        eval_split: what the final evaluation reads, or None for no evaluation.
        eval_batch_size: examples a batch of it.
        accelerator: of accelerate, whose processes share each batch and follow the loss of one; moves the model to its device.

    Raises:
        ValueError: for an argument out of range, or a checkpoint of another run.
    """
    processes = Processes(accelerator)
    autocast, rates = autocast or processes.autocast, (learning_rate, weight_decay, warmup, schedule)
    recipe = Recipe(steps, batch_size, *rates, seed, clip, autocast, dict(auxiliary or {}), accumulate)
    run = Run(model, task, recipe, log_every, callback, checkpoint, checkpoint_every, time_limit, processes)
    if not run.execute() or eval_split is None:
        return run.result({})
    return run.result(evaluate(model, task, eval_split, batch_size=eval_batch_size, autocast=autocast, processes=processes))
