"""Metrics that tasks share, as sums and counts."""

from __future__ import annotations

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from attnlab.tasks.contract import IGNORE, Batch

Scores = dict[str, tuple[float, float]]


def token_accuracy(logits: Float[Tensor, "b n k"] | Float[Tensor, "b k"], batch: Batch) -> Scores:
    """``accuracy``: right answers over targets that take part; ``loss``: their cross-entropy in nats."""
    takes_part = batch.targets != IGNORE
    count = float(takes_part.sum())
    right = ((logits.argmax(-1) == batch.targets) & takes_part).sum()
    return {"accuracy": (float(right), count), "loss": (_nats(logits, batch), count)}


def bits_per_byte(logits: Float[Tensor, "b n k"], batch: Batch) -> Scores:
    """``bits_per_byte``: cross-entropy in bits over targets that take part; ``loss``: the same in nats."""
    count = float((batch.targets != IGNORE).sum())
    nats = _nats(logits, batch)
    return {"bits_per_byte": (nats / math.log(2.0), count), "loss": (nats, count)}


def _nats(logits: Tensor, batch: Batch) -> float:
    flat = logits.flatten(0, -2).float()
    return float(F.cross_entropy(flat, batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"))


def squared_error(outputs: Float[Tensor, "b n k"], batch: Batch) -> Scores:
    """``mse``: squared errors over the numbers that take part, of targets in floating point; ``loss``: the same."""
    errors = _squares(outputs, batch)
    score = (float(errors.sum()), float(len(errors)))
    return {"mse": score, "loss": score}


def squared_loss(outputs: Float[Tensor, "b n k"], batch: Batch) -> Float[Tensor, ""]:
    """Their mean as a loss to train by."""
    return _squares(outputs, batch).mean()


def _squares(outputs: Tensor, batch: Batch) -> Tensor:
    takes_part = ~batch.targets.isnan()
    return (outputs.float()[takes_part] - batch.targets[takes_part]).square()
