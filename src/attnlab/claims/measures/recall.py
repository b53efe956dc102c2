"""Multi-query associative recall as it was published, at a size that two cores learn in minutes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnlab.claims.cells import Cells, Reporter, silent
from attnlab.claims.quantity import Measured, over
from attnlab.core.catalog import mixer_info
from attnlab.models import count_parameters, create_model
from attnlab.tasks.contract import Batch, Split
from attnlab.tasks.recall import AssociativeRecall
from attnlab.training import LogRow, evaluate, train

SWEEP_SEED = 0
CURVE_POINTS = 32


@dataclass(frozen=True)
class Setup:
    """Task, model and budget of a recall claim.

    No channel mixer, no convolution outside of the mixer, one head, learned positions for mixers that would not tell the order
    of the tokens otherwise, token 0 between the queries: as the task's authors compare mixers (Arora et al. 2023, appendix). The
    head is a matrix of its own: tied to an embedding as small as this it keeps Mamba on the plateau of guessing for long.

    Args:
        mixer: what is measured.
        seq_len: tokens.
        pairs: numbers of key-value pairs; each training batch has one of them, drawn anew, and each is evaluated.
        vocab_size: keys from its lower half, values from its upper half.
        dim: width.
        depth: layers.
        num_heads: heads of each.
        steps: optimiser steps at most.
        batch_size: sequences a step.
        stop_loss: a run ends early once the mean training loss since the last report is below this.
        learning_rates: the sweep.
        seeds: runs at the best of them.
        examples: evaluation examples for each number of pairs, of each split.
        mixer_options: the mixer's own options.
    """

    mixer: str
    seq_len: int
    pairs: Sequence[int]
    vocab_size: int
    dim: int
    depth: int
    num_heads: int
    steps: int
    batch_size: int
    stop_loss: float
    learning_rates: Sequence[float]
    seeds: int
    examples: int
    mixer_options: Mapping[str, Any] = field(default_factory=dict)

    def task(self, pairs: int) -> AssociativeRecall:
        """The task with this many pairs."""
        return AssociativeRecall(
            self.seq_len, pairs, self.vocab_size, random_non_queries=False, eval_examples=self.examples, seed=pairs
        )

    def cell(self, rate: float, seed: int) -> dict[str, Any]:
        """What determines one training run."""
        what = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("learning_rates", "seeds")}
        return {**what, "pairs": list(self.pairs), "mixer_options": dict(self.mixer_options), "rate": rate, "seed": seed}


class MixedRecall(AssociativeRecall):
    """Recall whose training batches have one of several numbers of pairs, drawn anew for each."""

    def __init__(self, parts: Sequence[AssociativeRecall]) -> None:
        most = max(parts, key=lambda part: part.num_pairs)
        super().__init__(most.seq_len, most.num_pairs, most.vocab_size, random_non_queries=most.random_non_queries)
        self.parts = parts

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """New examples without end."""
        while True:
            chosen = int(torch.randint(len(self.parts), (), generator=generator))
            yield self.parts[chosen].draw(batch_size, generator)


class _Solved(Exception):
    """Training may end: the loss is below the set-up's limit."""


def learn(setup: Setup, rate: float, seed: int, say: Reporter = silent) -> dict[str, Any]:
    """One training run: accuracy on both splits for each number of pairs, and the loss on the way, of which ``say`` hears."""
    parts = [setup.task(pairs) for pairs in setup.pairs]
    orderless = mixer_info(setup.mixer).supports.permutation_equivariant
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = create_model(
            "causal_lm",
            vocab_size=setup.vocab_size,
            dim=setup.dim,
            depth=setup.depth,
            mixer=setup.mixer,
            mixer_options=dict(setup.mixer_options),
            num_heads=setup.num_heads,
            channel_mixer=None,
            position="learned" if orderless else "none",
            max_length=setup.seq_len if orderless else None,
            tie_embeddings=False,
        )
    loss: list[tuple[int, float]] = []

    def watch(row: LogRow) -> None:
        loss.append((row.step, round(row.loss, 4)))
        say(f"  step {row.step} of {setup.steps}, loss {row.loss:.3f}")
        if row.loss < setup.stop_loss:
            raise _Solved

    try:
        status = train(
            model,
            MixedRecall(parts),
            steps=setup.steps,
            batch_size=setup.batch_size,
            learning_rate=rate,
            seed=seed,
            log_every=max(1, setup.steps // CURVE_POINTS),
            callback=watch,
            eval_split=None,
        ).status
    except _Solved:
        status = "finished"

    def scores(split: Split) -> dict[str, float]:
        if status == "diverged":
            return {str(part.num_pairs): 0.0 for part in parts}
        return {str(part.num_pairs): evaluate(model, part, split)["accuracy"] for part in parts}

    return {
        "status": status,
        "valid": scores("valid"),
        "test": scores("test"),
        "loss": [point for point in loss if math.isfinite(point[1])],
        "parameters": count_parameters(model),
    }


def mean(scores: Mapping[str, float]) -> float:
    """Each number of pairs with the same weight."""
    return sum(scores.values()) / len(scores)


def sweep(cells: Cells, setup: Setup) -> dict[str, Any]:
    """The runs of a mixer: every rate at one seed; the other seeds at the rate that is best on the validation split.

    Returns:
        JSON: "rate", "rates" (validation accuracy of each), "test" (for each seed the accuracy for each number of pairs),
        "valid", "loss" (of the first seed), "parameters".
    """

    def run(rate: float, seed: int) -> dict[str, Any]:
        name = f"{setup.mixer}, rate {rate:g}, seed {seed}"
        return cells(f"recall: {name}", setup.cell(rate, seed), lambda: learn(setup, rate, seed, cells.say))

    tried = {rate: run(rate, SWEEP_SEED) for rate in setup.learning_rates}
    best = max(tried, key=lambda rate: (mean(tried[rate]["valid"]), -rate))
    runs = [run(best, seed) for seed in range(setup.seeds)]
    return {
        "rate": best,
        "rates": {f"{rate:g}": mean(result["valid"]) for rate, result in tried.items()},
        "test": [result["test"] for result in runs],
        "valid": [mean(result["valid"]) for result in runs],
        "loss": runs[0]["loss"],
        "parameters": runs[0]["parameters"],
        "chance": 1.0 / (setup.vocab_size - setup.vocab_size // 2),
    }


def accuracy(cells: Cells, *, mixer: str, setup: Mapping[str, Any], against: str | None = None) -> Measured:
    """Share of queries answered rightly on held-out sequences, each number of pairs with the same weight.

    Quantities: "accuracy" over seeds, "fewest" and "most" at the ends of the pairs; with ``against`` the other mixer's as
    "other", and "gap", the other's less this one's, paired by seed.

    Args:
        cells: keeps each training run.
        mixer: what is measured.
        setup: the fields of `Setup` but for the mixer.
        against: a mixer to compare with, at its own best rate.
    """
    own = Setup(mixer=mixer, **setup)
    ours = sweep(cells, own)
    step = 1.0 / (own.examples * sum(own.pairs))
    values = [mean(scores) for scores in ours["test"]]
    quantities = {"accuracy": over(values, resolution=step)}
    for name, count in (("fewest", min(own.pairs)), ("most", max(own.pairs))):
        quantities[name] = over([scores[str(count)] for scores in ours["test"]], resolution=1.0 / (own.examples * count))
    details: dict[str, Any] = {mixer: ours}
    if against is not None:
        theirs = sweep(cells, Setup(mixer=against, **setup))
        others = [mean(scores) for scores in theirs["test"]]
        quantities["other"] = over(others, resolution=step)
        gaps = [other - ours for other, ours in zip(others, values, strict=True)]
        quantities["gap"] = over(gaps, resolution=2**0.5 * step)
        details[against] = theirs
    return Measured(quantities, details)
