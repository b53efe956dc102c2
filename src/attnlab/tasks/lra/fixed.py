"""Classification over a data set with fixed splits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnlab.tasks.contract import Batch, ModelName, Split, Task
from attnlab.tasks.scores import token_accuracy

Part = Literal["train", "valid", "test"]


class FixedSplits(Task):
    """A classification task whose training examples are as fixed as those of its evaluation splits."""

    kind = "classification"
    model: ClassVar[ModelName] = "encoder"
    metric = "accuracy"
    higher_is_better = True
    num_classes: ClassVar[int]

    @abstractmethod
    def labels(self, part: Part) -> Int[Tensor, "n"]:
        """The class of each example of a split."""

    @abstractmethod
    def batch(self, part: Part, rows: Int[Tensor, "b"]) -> Batch:
        """The examples of a split at these places."""

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Training examples drawn with replacement."""
        size = len(self.labels("train"))
        while True:
            yield self.batch("train", torch.randint(size, (batch_size,), generator=generator))

    def eval_batches(self, batch_size: int, split: Split = "valid") -> Iterator[Batch]:
        """All examples of a split in order."""
        for rows in torch.arange(len(self.labels(split))).split(batch_size):
            yield self.batch(split, rows)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of examples with the right class."""
        return token_accuracy(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of chance, and of the training examples' most frequent class."""
        return {"chance": 1.0 / self.num_classes, "majority": self.best_guess(split)}

    def best_guess(self, split: Split, cues: dict[Part, Int[Tensor, "n"]] | None = None) -> float:
        """Accuracy on a split of the class that is most frequent in training, overall or among examples with the same cue.

        Args:
            split: what is guessed.
            cues: a small non-negative integer an example, by split; None for none.
        """
        train, asked = self.labels("train"), self.labels(split)
        seen, now = (torch.zeros_like(train), torch.zeros_like(asked)) if cues is None else (cues["train"], cues[split])
        width = int(max(seen.max(), now.max())) + 1
        counts = torch.zeros(width, self.num_classes, dtype=torch.float64)
        counts.index_put_((seen, train), torch.ones(len(train), dtype=torch.float64), accumulate=True)
        counts += torch.bincount(train, minlength=self.num_classes) / (len(train) + 1.0)  # a cue never seen: the overall class
        return float((counts.argmax(1)[now] == asked).double().mean())


def pad_right(texts: list[bytes], length: int, shift: int = 0) -> tuple[Int[Tensor, "b {length}"], Bool[Tensor, "b {length}"]]:
    """Bytes as ids, cut and padded with 0 to ``length``, and the mask of what is real.

    Args:
        texts: one a row.
        length: tokens a row.
        shift: what is added to each byte.
    """
    ids, mask = torch.zeros(len(texts), length, dtype=torch.int64), torch.zeros(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        kept = torch.frombuffer(bytearray(text[:length]), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
        ids[row, : len(kept)] = kept.long() + shift
        mask[row, : len(kept)] = True
    return ids, mask
