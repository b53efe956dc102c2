"""Copying: a sequence is to be given again, all of it, or what stands at random places among noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnlab.tasks.contract import IGNORE, Batch, Budget, Split
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.registry import tasks
from attnlab.tasks.synthetic.answers import answer_scores, frequent, in_context

NOISE, ASK = 0, 1
"""Token ids of noise and of the question for the next token in selective copying; data tokens follow."""
MARK = 0
"""Token id that begins the sequence, and its copy, in copying; data tokens follow."""


@tasks.register("copy", family="recall")
class Copy(GeneratedTask):
    """Give a random sequence again, token by token (as Jelassi et al. 2024 ask it of language models).

    A mark, ``length`` random data tokens, the mark again, and the same tokens, each to be predicted from those before. A draw is
    one call for the data, (count, length).

    Args:
        length: tokens to copy.
        vocab_size: with the mark.
        eval_examples: examples in each evaluation split.
        seed: of the evaluation examples.

    Raises:
        ValueError: for no token to copy, or fewer than two to choose from.
    """

    kind = "recall"
    model = "causal_lm"
    metric = "accuracy"
    higher_is_better = True
    small: ClassVar[Mapping[str, Any]] = {"eval_examples": 40}

    def __init__(self, length: int = 8, vocab_size: int = 16, *, eval_examples: int = 256, seed: int = 0) -> None:
        if length < 1 or vocab_size < 3:
            raise ValueError(f"length, vocab_size: expected at least 1 and 3, got {length} and {vocab_size}")
        self.length, self.vocab_size = length, vocab_size
        super().__init__(eval_examples, seed)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A language model in which a two-tap convolution ties each token to the one before it."""
        return {"vocab_size": self.vocab_size, "short_conv": 2, "position": "none"}

    @property
    def default_budget(self) -> Budget:
        """5 to 10 seconds on one core at the default sizes."""
        return Budget(steps=400, batch_size=32, learning_rates=(0.01, 0.02), parameters=40_000, depth=1, num_heads=2)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` new examples."""
        data = torch.randint(MARK + 1, self.vocab_size, (count, self.length), generator=generator)
        mark = torch.full((count, 1), MARK)
        inputs = torch.cat((mark, data, mark, data[:, :-1]), 1)
        targets = torch.full_like(inputs, IGNORE)
        targets[:, self.length + 1 :] = data
        return Batch(inputs, targets)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of tokens copied; "answers": of whole sequences."""
        return answer_scores(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of guessing among all data tokens, and among those of the example."""
        batch = self.examples(split)
        place = torch.arange(batch.inputs.shape[1])
        data = ((place >= 1) & (place <= self.length)).expand_as(batch.inputs)
        return {"any_token": 1.0 / (self.vocab_size - MARK - 1), "token_in_context": in_context(batch, data)}


@tasks.register("selective_copy", family="recall", paper="mamba", partial=True)
class SelectiveCopy(GeneratedTask):
    """Give again, in order, data tokens that stand at random places among noise (Gu and Dao 2023, section 4.1.1).

    ``length`` tokens of noise (id 0), ``num_data`` of them replaced by data tokens, then as many questions (id 1), of which each
    asks for the next data token. Published: 4096 tokens, 16 of them data, 16 ids. A draw takes the data, (count, num_data), and
    then one number a token, whose least are at the places of data.

    Args:
        length: tokens before the questions.
        num_data: data tokens.
        vocab_size: with noise and question.
        eval_examples: examples in each evaluation split.
        seed: of the evaluation examples.

    Raises:
        ValueError: for sizes that do not fit.
    """

    kind = "recall"
    model = "causal_lm"
    metric = "accuracy"
    higher_is_better = True
    small: ClassVar[Mapping[str, Any]] = {"eval_examples": 40}

    def __init__(
        self, length: int = 16, num_data: int = 4, vocab_size: int = 16, *, eval_examples: int = 256, seed: int = 0
    ) -> None:
        if not 1 <= num_data <= length or vocab_size < ASK + 3:
            raise ValueError(
                f"length, num_data, vocab_size: expected 1 <= num_data <= length and at least {ASK + 3} ids, "
                f"got {length}, {num_data} and {vocab_size}"
            )
        self.length, self.num_data, self.vocab_size = length, num_data, vocab_size
        super().__init__(eval_examples, seed)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A language model with learned positions: questions are told apart by nothing else."""
        return {"vocab_size": self.vocab_size, "position": "learned", "max_length": self.length + self.num_data}

    @property
    def default_budget(self) -> Budget:
        """10 to 20 seconds on one core at the default sizes."""
        return Budget(steps=400, batch_size=64, learning_rates=(0.005, 0.01), parameters=60_000, depth=2, num_heads=2)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` new examples."""
        data = torch.randint(ASK + 1, self.vocab_size, (count, self.num_data), generator=generator)
        places = torch.rand(count, self.length, generator=generator).argsort(1)[:, : self.num_data].sort(1).values
        inputs = torch.full((count, self.length + self.num_data), NOISE).scatter_(1, places, data)
        inputs[:, self.length :] = ASK
        targets = torch.full_like(inputs, IGNORE)
        targets[:, self.length :] = data
        return Batch(inputs, targets)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of data tokens given again; "answers": of whole sequences."""
        return answer_scores(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of guessing among all data tokens, of the most frequent, and among those of the example."""
        batch = self.examples(split)
        return {
            "any_token": 1.0 / (self.vocab_size - ASK - 1),
            "frequent": frequent(batch),
            "token_in_context": in_context(batch, batch.inputs > ASK),
        }
