"""The contract of a task: data, loss, metrics, trivial baselines, and the budget at which it tells mechanisms apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlab.core.info import Info

Match = Literal["parameters", "compute"]
IGNORE = -100
"""The target that takes no part in loss and metrics."""

Split = Literal["valid", "test"]
Kind = Literal["recall", "language", "classification", "reasoning", "retrieval", "regression", "pointing"]
ModelName = Literal["causal_lm", "encoder", "matching", "tagger", "pointer"]


@dataclass(frozen=True)
class Batch:
    """Examples and what is asked of them.

    Args:
        inputs: token ids (batch, n) int64, or patches (batch, n, patch_dim) in floating point.
        targets: a class a token (batch, n), or a class an example (batch,), int64; `IGNORE` takes no part. Numbers to be met,
            where the task is a regression, are floating point: (batch, n, k), NaN takes no part.
        mask: (batch, n), True marks a real token; None means that all are.
        context: a second sequence, of ids or patches, for models that read one; None where there is none.
        context_mask: (batch, m), likewise.
    """

    inputs: Int[Tensor, "b n"] | Float[Tensor, "b n p"]
    targets: Int[Tensor, "b n"] | Int[Tensor, "b"] | Float[Tensor, "b n k"]
    mask: Bool[Tensor, "b n"] | None = None
    context: Int[Tensor, "b m"] | Float[Tensor, "b m p2"] | None = None
    context_mask: Bool[Tensor, "b m"] | None = None

    def __len__(self) -> int:
        """Examples."""
        return len(self.inputs)

    def tensors(self) -> list[Tensor]:
        """All that there are, in the order of the fields."""
        return [value for part in fields(self) if (value := getattr(self, part.name)) is not None]

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed in the same way: moved, or cut along the examples."""
        changed: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            changed[part.name] = None if value is None else change(value)
        return Batch(**changed)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return self.each(lambda value: value.to(device))

    def split(self, size: int) -> Iterator[Batch]:
        """The examples in order, ``size`` at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self.each(lambda value, rows=slice(start, start + size): value[rows])  # type: ignore[misc]

    def through(self, model: nn.Module) -> Tensor:
        """What ``model`` says of the inputs, and of the context where there is one."""
        second = {} if self.context is None else {"context": self.context, "context_mask": self.context_mask}
        return model(self.inputs, mask=self.mask, **second)

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads, padding included: what throughput counts."""
        second = 0 if self.context is None else self.context.shape[1]
        return len(self) * (self.inputs.shape[1] + second)


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
        match: what models of different mixers have as much of: "parameters", or "compute", the operations an example of the
            softmax model of that many parameters.
        model: options of the reference model that differ from the task's.
    """

    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    parameters: int
    depth: int
    num_heads: int
    weight_decay: float = 0.01
    warmup: float = 0.1
    match: Match = "parameters"
    model: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A source of batches with a loss, metrics and baselines.

    Its reference model is ``create_model(task.model, **task.model_options, mixer=..., dim=..., depth=..., num_heads=...)``;
    `attnlab.tasks.reference_model` builds it at a parameter budget.
    """

    info: ClassVar[Info]
    kind: ClassVar[Kind]
    model: ClassVar[ModelName]
    small: ClassVar[Mapping[str, Any]] = {}
    """Options with which all about the task is done in a blink: what its tests take."""
    source: ClassVar[str] = ""
    """Where the data must be fetched from, for tasks that need a ``path``; empty where nothing has to be fetched."""
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
