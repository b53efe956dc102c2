"""Selective copying: tokens at random places among noise are to be given again, in order, at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from attnlab.claims.cells import Cells
from attnlab.claims.quantity import Measured, over
from attnlab.models import create_model
from attnlab.tasks.contract import IGNORE, Batch, Budget, Split, Task
from attnlab.tasks.scores import token_accuracy
from attnlab.training import evaluate, train

NOISE, ASK = 0, 1
"""Token ids of noise and of the question for the next token; data tokens follow."""


class SelectiveCopying(Task):
    """``length`` tokens of noise with ``count`` data tokens at random places, then ``count`` questions (Gu and Dao 2023, 4.1.1).

    Args:
        length: tokens before the questions.
        count: data tokens.
        vocab_size: with noise and question.
        examples: evaluation examples of each split.
    """

    kind = "recall"
    model = "causal_lm"
    metric = "accuracy"
    higher_is_better = True

    def __init__(self, length: int, count: int, vocab_size: int, examples: int) -> None:
        self.length, self.count, self.vocab_size, self.examples = length, count, vocab_size, examples

    @property
    def model_options(self) -> Mapping[str, Any]:
        """The vocabulary."""
        return {"vocab_size": self.vocab_size, "position": "none"}

    @property
    def default_budget(self) -> Budget:
        """A minute on one core."""
        return Budget(steps=600, batch_size=32, learning_rates=(0.003, 0.01), parameters=60_000, depth=2, num_heads=1)

    def draw(self, number: int, generator: torch.Generator) -> Batch:
        """``number`` new examples."""
        data = torch.randint(ASK + 1, self.vocab_size, (number, self.count), generator=generator)
        places = torch.rand(number, self.length, generator=generator).argsort(1)[:, : self.count].sort(1).values
        inputs = torch.full((number, self.length + self.count), NOISE).scatter_(1, places, data)
        inputs[:, self.length :] = ASK
        targets = torch.full_like(inputs, IGNORE)
        targets[:, self.length :] = data
        return Batch(inputs, targets)

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """New examples without end."""
        while True:
            yield self.draw(batch_size, generator)

    def eval_batches(self, batch_size: int, split: Split = "valid") -> Iterator[Batch]:
        """The examples of the split's own seed."""
        examples = self.draw(self.examples, torch.Generator().manual_seed({"valid": 1, "test": 2}[split]))
        parts = zip(examples.inputs.split(batch_size), examples.targets.split(batch_size), strict=True)
        yield from (Batch(inputs, targets) for inputs, targets in parts)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of data tokens given again."""
        return token_accuracy(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of guessing."""
        return {"chance": 1.0 / (self.vocab_size - ASK - 1)}

    def fingerprint(self) -> str:
        """Hash of the evaluation examples."""
        digest = hashlib.sha256()
        for split in ("valid", "test"):
            for batch in self.eval_batches(self.examples, split):
                digest.update(batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes())
        return digest.hexdigest()


def learn(mixer: str, options: Mapping[str, Any], rate: float, seed: int, setup: Mapping[str, Any]) -> dict[str, Any]:
    """One training run of a model without channel mixer: accuracy on both splits."""
    task = SelectiveCopying(setup["length"], setup["count"], setup["vocab_size"], setup["examples"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = create_model(
            "causal_lm",
            vocab_size=task.vocab_size,
            dim=setup["dim"],
            depth=setup["depth"],
            mixer=mixer,
            mixer_options=dict(options),
            channel_mixer=None,
        )
    run = train(model, task, steps=setup["steps"], batch_size=setup["batch_size"], learning_rate=rate, seed=seed, eval_split=None)
    done = run.status != "diverged"
    scores = {split: evaluate(model, task, split)["accuracy"] if done else 0.0 for split in ("valid", "test")}
    return {**scores, "loss": [[row.step, round(row.loss, 4)] for row in run.history if done]}


def selection(
    cells: Cells, *, mixer: str, selective: Mapping[str, Any], invariant: Mapping[str, Any], setup: Mapping[str, Any]
) -> Measured:
    """Selective copying with and without maps that depend on the token, each at its best rate.

    Quantities: "selective" and "invariant", accuracies on held-out sequences over seeds; "gap", their difference paired by seed.

    Args:
        cells: keeps each training run.
        mixer: what is measured.
        selective: its options with selection.
        invariant: its options without.
        setup: length, count, vocab_size, examples, dim, depth, steps, batch_size, learning_rates, seeds.
    """
    scores: dict[str, list[float]] = {}
    details: dict[str, Any] = {}
    fixed = {key: value for key, value in setup.items() if key not in ("learning_rates", "seeds")}
    for label, options in (("selective", selective), ("invariant", invariant)):

        def run(rate: float, seed: int, label: str = label, options: Mapping[str, Any] = options) -> dict[str, Any]:
            settings = {"mixer": mixer, "options": dict(options), "rate": rate, "seed": seed, **fixed}
            name = f"selective copying, {label}, rate {rate:g}, seed {seed}"
            return cells(name, settings, lambda: learn(mixer, options, rate, seed, fixed))

        tried = {rate: run(rate, 0) for rate in setup["learning_rates"]}
        best = max(tried, key=lambda rate: (tried[rate]["valid"], -rate))
        runs = [run(best, seed) for seed in range(setup["seeds"])]
        scores[label] = [result["test"] for result in runs]
        details[label] = {"rate": best, "rates": {f"{r:g}": result["valid"] for r, result in tried.items()}, "runs": runs}
    step = 1.0 / (setup["examples"] * setup["count"])
    gaps = [a - b for a, b in zip(scores["selective"], scores["invariant"], strict=True)]
    quantities = {name: over(values, resolution=step) for name, values in scores.items()}
    return Measured({**quantities, "gap": over(gaps, resolution=2**0.5 * step)}, details)
