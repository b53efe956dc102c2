"""Multi-query associative recall: remember several key-value pairs, and give a key's value when it comes again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.tasks.contract import IGNORE, Batch, Budget, Split
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.registry import tasks
from attnlab.tasks.scores import token_accuracy


def gap_weights(slots: int, power: float) -> Float[Tensor, "slots"]:
    """Chance that a query takes slot g = 0, 1, ... after the pairs, proportional to $(g + 1)^{a - 1}$."""
    weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (power - 1.0)
    return weights / weights.sum()


def _distinct(batch: int, low: int, high: int, count: int, generator: torch.Generator) -> Int[Tensor, "b k"]:
    """``count`` distinct integers of [low, high) an example, in random order."""
    return low + torch.rand(batch, high - low, generator=generator).argsort(1)[:, :count]


@tasks.register("recall", family="recall")
class AssociativeRecall(GeneratedTask):
    r"""Multi-query associative recall as Arora et al. define it (2023, "Zoology", section 4 and appendix).

    A sequence of ``seq_len`` tokens begins with k key-value pairs, keys drawn without repeat from $[1, V/2)$, values from
    $[V/2, V)$. The rest is 2-token slots; each key comes once more, at the start of slot g, drawn without repeat with
    probability proportional to $(g+1)^{a-1}$, and its target there is its value. All other targets are ignored. What is neither
    pair nor query is a random token of the vocabulary, or token 0 with ``random_non_queries=False``.

    The defaults are learnt within seconds; 64 tokens with 8 pairs and more tell more, and take their time.

    Args:
        seq_len: n, even, at least 4 k.
        num_pairs: k.
        vocab_size: V, with more than k keys in its lower half.
        power: a; the smaller, the sooner queries come after the pairs.
        random_non_queries: fill with random tokens.
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
        self,
        seq_len: int = 24,
        num_pairs: int = 3,
        vocab_size: int = 32,
        *,
        power: float = 0.01,
        random_non_queries: bool = True,
        eval_examples: int = 256,
        seed: int = 0,
    ) -> None:
        if num_pairs < 1 or seq_len % 2 or seq_len < 4 * num_pairs:
            raise ValueError(
                f"seq_len, num_pairs: expected an even seq_len of at least 4 num_pairs, got {seq_len} and {num_pairs}"
            )
        if vocab_size // 2 - 1 < num_pairs:
            raise ValueError(f"vocab_size: expected at least {2 * num_pairs + 2} for {num_pairs} keys, got {vocab_size}")
        self.seq_len, self.num_pairs, self.vocab_size = seq_len, num_pairs, vocab_size
        self.power, self.random_non_queries = power, random_non_queries
        super().__init__(eval_examples, seed)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A language model in which a two-tap convolution ties each value to its key, so that the mixer has only to recall."""
        return {"vocab_size": self.vocab_size, "short_conv": 2, "position": "none"}

    @property
    def default_budget(self) -> Budget:
        """1 to 5 seconds on one core at the default sizes."""
        return Budget(steps=350, batch_size=32, learning_rates=(0.01, 0.02), parameters=40_000, depth=1, num_heads=2)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` new examples."""
        pairs, length, half = self.num_pairs, self.seq_len, self.vocab_size // 2
        keys = _distinct(count, 1, half, pairs, generator)
        values = _distinct(count, half, self.vocab_size, pairs, generator)
        weights = gap_weights((length - 2 * pairs) // 2, self.power).expand(count, -1)
        slots = 2 * pairs + 2 * torch.multinomial(weights, pairs, replacement=False, generator=generator)
        inputs = torch.zeros(count, length, dtype=torch.int64)
        if self.random_non_queries:
            inputs = torch.randint(self.vocab_size, (count, length), generator=generator)
        inputs[:, : 2 * pairs] = torch.stack((keys, values), dim=2).flatten(1)
        inputs.scatter_(1, slots, keys)
        targets = torch.full_like(inputs, IGNORE).scatter_(1, slots, values)
        return Batch(inputs, targets)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of queries answered with the right value."""
        return token_accuracy(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of guessing among all values, and among those in the context; no model without recall does better."""
        return {"any_value": 1.0 / (self.vocab_size - self.vocab_size // 2), "value_in_context": 1.0 / self.num_pairs}
