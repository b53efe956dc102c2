"""Selective copying: tokens at random places among noise are to be given again, in order, at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attnlab.claims.cells import Cells
from attnlab.claims.quantity import Measured, over
from attnlab.models import create_model
from attnlab.tasks.synthetic.copying import SelectiveCopy
from attnlab.training import evaluate, train


def learn(mixer: str, options: Mapping[str, Any], rate: float, seed: int, setup: Mapping[str, Any]) -> dict[str, Any]:
    """One training run of a model without channel mixer: accuracy on both splits."""
    task = SelectiveCopy(setup["length"], setup["count"], setup["vocab_size"], eval_examples=setup["examples"])
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
