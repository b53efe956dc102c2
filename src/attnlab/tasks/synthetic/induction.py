"""Induction heads: what followed the trigger when it came before?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnlab.tasks.contract import IGNORE, Batch, Budget, Split
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.registry import tasks
from attnlab.tasks.synthetic.answers import answer_scores, frequent

TRIGGER = 0
"""Token id of the trigger; the others are noise and answers."""


@tasks.register("induction", family="recall", paper="mamba", partial=True)
class Induction(GeneratedTask):
    """A trigger stands once among random tokens and once at the end; the answer is what followed it (Gu and Dao 2023, 4.1.2).

    Published: 256 tokens in training and up to a million in evaluation, 16 ids besides the trigger. ``eval_length`` asks how far
    a model goes beyond the length that it was trained at. A draw takes the random tokens, (count, n), and then the trigger's
    places.

    Args:
        seq_len: n, tokens of a training sequence, the last trigger included; at least 3.
        vocab_size: with the trigger.
        eval_length: tokens of an evaluation sequence; None is ``seq_len``.
        eval_examples: examples in each evaluation split.
        seed: of the evaluation examples.

    Raises:
        ValueError: for sizes that do not fit.
    """

    kind = "recall"
    model = "causal_lm"
    metric = "accuracy"
    higher_is_better = True
    small: ClassVar[Mapping[str, Any]] = {"eval_examples": 40, "eval_length": 48}

    def __init__(
        self,
        seq_len: int = 32,
        vocab_size: int = 17,
        eval_length: int | None = None,
        *,
        eval_examples: int = 512,
        seed: int = 0,
    ) -> None:
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.eval_length = seq_len if eval_length is None else eval_length
        if min(seq_len, self.eval_length) < 3 or vocab_size < 3:
            raise ValueError(
                f"seq_len, eval_length, vocab_size: expected at least 3, got {seq_len}, {eval_length} and {vocab_size}"
            )
        super().__init__(eval_examples, seed)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A language model in which a two-tap convolution ties each token to the one before it."""
        return {"vocab_size": self.vocab_size, "short_conv": 2, "position": "none"}

    @property
    def default_budget(self) -> Budget:
        """5 to 15 seconds on one core at the default sizes."""
        return Budget(steps=300, batch_size=64, learning_rates=(0.01, 0.02), parameters=40_000, depth=1, num_heads=2)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` new examples of the training length."""
        return self._draw(count, self.seq_len, generator)

    def draw_split(self, count: int, generator: torch.Generator, split: Split) -> Batch:
        """Examples of the evaluation length."""
        return self._draw(count, self.eval_length, generator)

    def _draw(self, count: int, length: int, generator: torch.Generator) -> Batch:
        inputs = torch.randint(TRIGGER + 1, self.vocab_size, (count, length), generator=generator)
        places = torch.randint(length - 2, (count, 1), generator=generator)
        inputs.scatter_(1, places, TRIGGER)
        inputs[:, -1] = TRIGGER
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -1:] = inputs.gather(1, places + 1)
        return Batch(inputs, targets)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of sequences answered rightly."""
        return answer_scores(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of guessing among all tokens, of the most frequent answer, and of each example's most frequent token."""
        batch = self.examples(split)
        noise = batch.inputs[:, :-1]
        modes = torch.where(noise == TRIGGER, -1 - torch.arange(noise.shape[1]), noise).mode(1).values
        return {
            "any_token": 1.0 / (self.vocab_size - TRIGGER - 1),
            "frequent": frequent(batch),
            "frequent_in_context": float((modes == batch.targets[:, -1]).double().mean()),
        }
