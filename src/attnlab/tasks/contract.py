"""The contract of a task: data, loss, metrics, trivial baselines, and the budget at which it tells mechanisms apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.core.info import Info

IGNORE = -100
"""The target that takes no part in loss and metrics."""

Split = Literal["valid", "test"]
Kind = Literal["recall", "language", "classification"]
ModelName = Literal["causal_lm", "encoder"]


@dataclass(frozen=True)
class Batch:
    """Examples and what is asked of them.

    Args:
        inputs: token ids (batch, n) int64, or patches (batch, n, patch_dim) in floating point.
        targets: a class a token (batch, n), or a class an example (batch,), int64; `IGNORE` takes no part.
        mask: (batch, n), True marks a real token; None means that all are.
    """

    inputs: Int[Tensor, "b n"] | Float[Tensor, "b n p"]
    targets: Int[Tensor, "b n"] | Int[Tensor, "b"]
    mask: Bool[Tensor, "b n"] | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device), mask=mask)

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads, padding included: what throughput counts."""
        return self.inputs.shape[0] * self.inputs.shape[1]


@dataclass(frozen=True)
class Budget:
    """What one training run of a comparison spends by default.

    Args:
        steps: optimiser steps.
        batch_size: examples a step.
        learning_rates: peak rates worth trying, in rising order.
        parameters: size of the model, embeddings included; the width follows from it.
        depth: blocks.
        num_heads: heads of every mixer that has some; the width is a multiple of it.
        weight_decay: AdamW's, on matrices alone.
        warmup: share of the steps over which the rate rises linearly.
    """

    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    parameters: int
    depth: int
    num_heads: int
    weight_decay: float = 0.01
    warmup: float = 0.1


class Task(ABC):
    """A source of batches with a loss, metrics and baselines.

    Its reference model is ``create_model(task.model, **task.model_options, mixer=..., dim=..., depth=..., num_heads=...)``;
    `attnlab.tasks.reference_model` builds it at a parameter budget.
    """

    info: ClassVar[Info]
    kind: ClassVar[Kind]
    model: ClassVar[ModelName]
    metric: ClassVar[str]
    """Name of the metric by which mechanisms are ranked."""
    higher_is_better: ClassVar[bool]

    @property
    @abstractmethod
    def model_options(self) -> Mapping[str, Any]:
        """What the reference model must be told of the data: vocab_size, max_length, num_classes, grid, ..."""

    @property
    @abstractmethod
    def default_budget(self) -> Budget:
        """A budget of seconds on two CPU cores at which softmax attention beats every trivial baseline."""

    @abstractmethod
    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Training batches without end.

        The generator is the only state: one restored to an earlier state continues the same stream, and nothing is drawn
        before it is asked for.
        """

    @abstractmethod
    def eval_batches(self, batch_size: int, split: Split = "valid") -> Iterator[Batch]:
        """The fixed evaluation examples of a split, each once, in a fixed order; the last batch may be smaller."""

    @abstractmethod
    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """What needs no model (chance, majority, unigram, ...), in the primary metric on a split."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A SHA-256 in hex over the data or, where it is generated, over what generates it and the evaluation examples."""

    def loss(self, logits: Float[Tensor, "b n k"] | Float[Tensor, "b k"], batch: Batch) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats over the targets that take part."""
        return F.cross_entropy(logits.flatten(0, -2).float(), batch.targets.flatten(), ignore_index=IGNORE)

    @abstractmethod
    def metrics(self, logits: Float[Tensor, "b n k"] | Float[Tensor, "b k"], batch: Batch) -> dict[str, tuple[float, float]]:
        """For each metric the sum over the batch and the count that it is to be divided by, once summed over batches."""
