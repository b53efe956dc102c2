"""The training loop: AdamW, warm-up and cosine decay, clipping, logging, checkpoints that resume bit-equal."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from attnlab.tasks.contract import Split, Task
from attnlab.training.result import LogRow, TrainResult


def evaluate(
    model: nn.Module,
    task: Task,
    split: Split = "valid",
    *,
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Mean metrics of ``model`` over all examples of ``split``, in evaluation mode; the mode is put back afterwards."""
    raise NotImplementedError


def train(
    model: nn.Module,
    task: Task,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    schedule: Literal["cosine", "constant"] = "cosine",
    seed: int = 0,
    clip: float | None = 1.0,
    autocast: torch.dtype | None = None,
    log_every: int = 20,
    callback: Callable[[LogRow], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    time_limit: float | None = None,
    eval_split: Split | None = "valid",
    eval_batch_size: int = 64,
) -> TrainResult:
    """Train ``model`` in place, where its parameters are.

    Args:
        model: maps ``(batch.inputs, mask=batch.mask)`` to logits.
        task: batches, loss and metrics.
        steps: optimiser steps in all.
        batch_size: examples a step.
        learning_rate: peak rate.
        weight_decay: AdamW's; not applied to vectors, nor to parameters that carry ``_no_weight_decay = True``.
        warmup: share of ``steps`` over which the rate rises linearly.
        schedule: "cosine" to a tenth of a percent of the peak, or "constant".
        seed: of the training batches and of what the model draws (dropout, stochastic depth).
        clip: global gradient norm to clip to, or None.
        autocast: dtype of mixed precision, or None.
        log_every: steps between rows of the history.
        callback: called with each row as it is logged.
        checkpoint: folder of a checkpoint; one that is there is resumed from, and it is written at the end, at the time limit and
            every ``checkpoint_every`` steps. On CPU a resumed run ends bit-equal to one that was never stopped.
        checkpoint_every: steps between checkpoints.
        time_limit: seconds after which this call stops with status "time_limit".
        eval_split: what the final evaluation reads, or None for no evaluation.
        eval_batch_size: examples a batch of it.

    Raises:
        ValueError: for an argument out of range, or a checkpoint of another run.
    """
    raise NotImplementedError
