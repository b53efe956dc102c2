"""Tasks whose examples are drawn: training without end, evaluation from seeds of its own."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property

import torch

from attnlab.tasks.contract import Batch, Split, Task

SPLIT_SEEDS: dict[Split, int] = {"valid": 1, "test": 2}
"""What evaluation seeds add to four times the task's own."""


class GeneratedTask(Task):
    """A task that `draw` defines.

    Args:
        eval_examples: examples in each evaluation split.
        seed: of the evaluation examples; those of training come from the generator that `train_batches` is given.

    Raises:
        ValueError: for sizes out of range.
    """

    def __init__(self, eval_examples: int, seed: int) -> None:
        if eval_examples < 1 or seed < 0:
            raise ValueError(
                f"eval_examples, seed: expected a positive and a non-negative integer, got {eval_examples} and {seed}"
            )
        self.eval_examples, self.seed = eval_examples, seed

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` new examples; the generator is the only source of chance."""

    def draw_split(self, count: int, generator: torch.Generator, split: Split) -> Batch:
        """Examples of an evaluation split, where these differ from those of training."""
        return self.draw(count, generator)

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """New examples without end."""
        while True:
            yield self.draw(batch_size, generator)

    def examples(self, split: Split) -> Batch:
        """All examples of an evaluation split, drawn once."""
        return self._drawn[split]

    @cached_property
    def _drawn(self) -> dict[Split, Batch]:
        return {
            split: self.draw_split(self.eval_examples, torch.Generator().manual_seed(4 * self.seed + number), split)
            for split, number in SPLIT_SEEDS.items()
        }

    def eval_batches(self, batch_size: int, split: Split = "valid") -> Iterator[Batch]:
        """The examples of the split's own seed."""
        return self.examples(split).split(batch_size)

    def fingerprint(self) -> str:
        """Hash of both evaluation splits, which the sizes, the seed and the way of drawing determine."""
        digest = hashlib.sha256()
        for split in SPLIT_SEEDS:
            for tensor in self.examples(split).tensors():
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()
