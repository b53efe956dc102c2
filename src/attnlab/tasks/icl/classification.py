"""In-context classification: the label of an item from others of its class, by memory of the sequence or of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from attnlab.tasks.contract import IGNORE, Batch, Budget, Split
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.icl.mixture import Burst, Mixture, Sequences, draw_sequences
from attnlab.tasks.registry import tasks
from attnlab.tasks.scores import token_accuracy

SETS = ("mixed", "icl", "flipped", "iwl")
"""What evaluation may be on: as in training, new classes, labels moved on by one, or classes absent from the context."""

PUBLISHED: dict[str, Any] = {
    "num_classes": 1024,
    "num_labels": 32,
    "num_pairs": 8,
    "item_dim": 63,
    "max_pairs": 32,
    "copies": 1,
}
"""The paper's sizes; it varies num_classes, copies, bursty, fresh, noise and alpha around them."""


@tasks.register("in_context_classification", family="recall", paper="icl-induction")
class InContextClassification(GeneratedTask):
    r"""What is the label of the last item (Reddy 2023, after Chan et al. 2022)?

    A sequence is $x_1, l_1, \ldots, x_N, l_N, x$: items of Gaussian classes with their labels' vectors, and a query at the last
    token, where the label is asked for among L. In a bursty sequence the query's class is in the context, so that an induction
    head can copy its label; known classes have the same label throughout, so that weights can remember it. Many classes, noise
    and bursts favour the first, few classes and a Zipf exponent the second.

    Token content lies behind a one-hot position; sequences begin anywhere among the positions. ``evaluate_on`` gives the paper's
    four test sets. As published, see `PUBLISHED`, a network takes 150,000 steps; the defaults are learnt within a minute.

    Draw order: the seed's ``RandomState`` draws the vectors of labels and classes; in `draw`, one integer from the torch
    generator seeds another, from which `draw_sequences` draws.

    Args:
        num_classes: K, a multiple of L.
        num_labels: L, a divisor of 128, the number of new classes.
        num_pairs: N.
        item_dim: D, numbers an item.
        max_pairs: N_max, at least N; positions are 2 N_max + 1.
        copies: B, a divisor of N below it, or 0.
        bursty: p_B.
        fresh: p_C, the share of sequences of new classes.
        noise: eps, within a class.
        alpha: Zipf exponent of the classes.
        distinct_labels: the classes of a bursty sequence have different labels.
        evaluate_on: one of `SETS`.
        eval_examples: sequences in each evaluation split.
        seed: of the vectors and of the evaluation examples.

    Raises:
        ValueError: for sizes that do not fit.
    """

    kind = "classification"
    model = "tagger"
    metric = "accuracy"
    higher_is_better = True
    small: ClassVar[Mapping[str, Any]] = {"num_classes": 32, "num_pairs": 4, "eval_examples": 40}

    def __init__(
        self,
        num_classes: int = 256,
        num_labels: int = 8,
        num_pairs: int = 4,
        item_dim: int = 15,
        *,
        max_pairs: int = 8,
        copies: int = 2,
        bursty: float = 1.0,
        fresh: float = 0.0,
        noise: float = 0.1,
        alpha: float = 0.0,
        distinct_labels: bool = False,
        evaluate_on: str = "mixed",
        eval_examples: int = 512,
        seed: int = 0,
    ) -> None:
        if num_labels < 2 or num_classes % num_labels or 128 % num_labels:
            raise ValueError(
                "num_classes, num_labels: expected a multiple of the labels and a divisor of 128, "
                f"got {num_classes} and {num_labels}"
            )
        if not 2 <= num_pairs <= max_pairs or copies < 0 or copies >= num_pairs or (copies and num_pairs % copies):
            raise ValueError(
                "num_pairs, copies: expected 2 to max_pairs pairs and copies that divide them and are fewer, "
                f"got {num_pairs} of {max_pairs} and {copies}"
            )
        if distinct_labels and copies and num_pairs // copies > num_labels:
            raise ValueError(f"distinct_labels: expected at most {num_labels} classes a sequence, got {num_pairs // copies}")
        if evaluate_on not in SETS:
            raise ValueError(f"evaluate_on: expected one of {SETS}, got {evaluate_on!r}")
        for name, share in (("bursty", bursty), ("fresh", fresh)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name}: expected a probability, got {share}")
        if item_dim < 1 or noise < 0.0:
            raise ValueError(f"item_dim, noise: expected a positive width and no negative noise, got {item_dim} and {noise}")
        super().__init__(eval_examples, seed)
        self.burst = Burst(
            num_pairs, max_pairs, copies, float(bursty), float(fresh), float(noise), distinct_labels=distinct_labels
        )
        self.evaluate_on = evaluate_on
        rng = np.random.RandomState(seed)
        self.mixture = Mixture.drawn(num_classes, num_labels, item_dim, rng, float(alpha))

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A causal tagger over vectors; a two-tap convolution ties each label to its item, so that the mixer has to compare."""
        width = 2 * self.burst.max_pairs + 1 + self.mixture.labels.shape[1]
        return {
            "num_outputs": len(self.mixture.labels),
            "input_dim": width,
            "causal": True,
            "short_conv": 2,
            "position": "none",
            "max_length": 2 * self.burst.num_pairs + 1,
        }

    @property
    def default_budget(self) -> Budget:
        """Some 10 seconds on one core."""
        return Budget(steps=600, batch_size=64, learning_rates=(0.005, 0.01), parameters=30_000, depth=2, num_heads=2)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Sequences as in training."""
        return self._batch(self.sequences(self.burst, count, generator))

    def draw_split(self, count: int, generator: torch.Generator, split: Split) -> Batch:
        """Sequences of the set to evaluate on."""
        return self._batch(self._evaluation(count, generator), moved=self.evaluate_on == "flipped")

    def sequences(self, burst: Burst, count: int, generator: torch.Generator) -> Sequences:
        """``count`` sequences made as ``burst`` says."""
        seed = int(torch.randint(2**32, (), generator=generator))
        return draw_sequences(self.mixture, burst, count, np.random.RandomState(seed))

    def _evaluation(self, count: int, generator: torch.Generator) -> Sequences:
        changes: dict[str, dict[str, Any]] = {
            "mixed": {},
            "icl": {"bursty": 1.0, "fresh": 1.0},
            "flipped": {"bursty": 1.0, "fresh": 0.0, "flip": True},
            "iwl": {"copies": 0, "fresh": 0.0},
        }
        return self.sequences(replace(self.burst, **changes[self.evaluate_on]), count, generator)

    def _batch(self, drawn: Sequences, moved: bool = False) -> Batch:
        labels = torch.from_numpy((drawn.label + moved) % len(self.mixture.labels))
        targets = torch.full(drawn.inputs.shape[:2], IGNORE)
        targets[:, -1] = labels
        return Batch(torch.from_numpy(drawn.inputs).float(), targets)

    def metrics(self, logits: Float[Tensor, "b n k"], batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of queries with the right label."""
        return token_accuracy(logits, batch)

    @cached_property
    def _label_shares(self) -> Float[np.ndarray, "l"]:
        return np.bincount(self.mixture.label_of, weights=self.mixture.probabilities)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of the most frequent label, and of a label of the context: any, or the most frequent there."""
        batch = self.examples(split)
        content = batch.inputs[..., 2 * self.burst.max_pairs + 1 :].double()
        vectors = torch.from_numpy(self.mixture.labels)
        context = torch.cdist(content[:, 1::2], vectors).argmin(-1)
        asked = batch.targets[:, -1]
        counts = torch.nn.functional.one_hot(context, len(vectors)).sum(1).double()
        most = counts == counts.max(1, keepdim=True).values
        right = torch.nn.functional.one_hot(asked, len(vectors)).bool()
        return {
            "majority": float((asked == int(self._label_shares.argmax())).double().mean()),
            "label_in_context": float(counts[right].mean() / self.burst.num_pairs),
            "commonest_in_context": float((most[right] / most.sum(1)).mean()),
        }
