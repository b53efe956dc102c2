"""Attention sinks on the bigram-backcopy task: who attends to the first token, and what that has to give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnlab.claims.cells import Cells
from attnlab.claims.quantity import Measured, over
from attnlab.mixers.attention import AttentionMixer
from attnlab.models import create_model
from attnlab.tasks.bigram_backcopy.task import BigramBackcopy
from attnlab.training import evaluate, train

SEQUENCES = 64
"""Test sequences over which attention is averaged."""


def attended(model: nn.Module, mixer: AttentionMixer, inputs: Tensor) -> Tensor:
    """What the mixer was given when the model read ``inputs``."""
    given: list[Tensor] = []
    hook = mixer.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    with torch.no_grad():
        model.eval()(inputs)
    hook.remove()
    return given[0]


def probe(model: nn.Module, task: BigramBackcopy) -> dict[str, float]:
    """Attention to the first token and to the previous one, and how long the first token's value is beside the others'.

    Returns:
        "sink", mean weight of the first token in rows that are no trigger's; "previous", of the previous token in the triggers'
        rows; "value", length of the first token's value over the mean of the others', of all heads together.
    """
    (mixer,) = [part for part in model.modules() if isinstance(part, AttentionMixer)]
    inputs = task.examples("test").inputs[:SEQUENCES]
    x = attended(model, mixer, inputs)
    with torch.no_grad():
        weights = mixer.mixing_matrix(x).mean(1)
        lengths = mixer.project(x)[2].square().sum((1, 3)).sqrt()
    trigger = torch.from_numpy(task.language.is_trigger(inputs.numpy()))
    plain = ~trigger
    plain[:, 0] = False  # the first token sees nothing else
    previous = weights.diagonal(-1, dim1=1, dim2=2)
    return {
        "sink": float(weights[:, :, 0][plain].mean()),
        "previous": float(previous[trigger[:, 1:]].mean()),
        "value": float((lengths[:, 0] / lengths[:, 1:].mean(1)).mean()),
    }


def learn(mixer: str, *, seed: int, seq_len: int, dim: int, steps: int, batch_size: int, rate: float) -> dict[str, Any]:
    """Train one layer with one head, and probe it."""
    task = BigramBackcopy(seq_len)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = create_model(
            "causal_lm",
            dim=dim,
            depth=1,
            mixer=mixer,
            num_heads=1,
            mixer_options={"out_bias": False},
            channel_options={"bias": False},
            tie_embeddings=False,
            **task.model_options,
        )
    train(
        model,
        task,
        steps=steps,
        batch_size=batch_size,
        learning_rate=rate,
        seed=seed,
        eval_split=None,
        warmup=0.0,
        schedule="constant",  # with the decay as published: a sink grows for as long as the rate lets it
        weight_decay=1e-4,
    )
    scores = evaluate(model, task, "test")
    return {**probe(model, task), "copy_loss": scores["copy_loss"], "bigram_loss": scores["bigram_loss"]}


def backcopy(
    cells: Cells,
    *,
    mixer: str,
    against: str,
    seq_len: int,
    dim: int,
    steps: int,
    batch_size: int,
    rate: float,
    seeds: int,
) -> Measured:
    """Sinks in one trained layer of a mechanism and of another.

    Quantities: of ``mixer`` "sink", "previous", "value" and "copy_loss" as `probe` and the task have them, and the same of
    ``against`` with "other_" before.

    Args:
        cells: keeps each training run.
        mixer: what is said to form sinks.
        against: what is said to form none.
        seq_len: tokens.
        dim: width.
        steps: of training.
        batch_size: sequences a step.
        rate: learning rate.
        seeds: runs of each.
    """
    settings = {"seq_len": seq_len, "dim": dim, "steps": steps, "batch_size": batch_size, "rate": rate}

    def run(name: str, seed: int) -> dict[str, Any]:
        return cells(f"bigram-backcopy: {name}, seed {seed}", settings, lambda: learn(name, seed=seed, **settings))  # type: ignore[arg-type]

    quantities, details = {}, {}
    for prefix, name in (("", mixer), ("other_", against)):
        details[name] = [run(name, seed) for seed in range(seeds)]
        for what in ("sink", "previous", "value", "copy_loss"):
            quantities[prefix + what] = over([result[what] for result in details[name]], unit="nats" if "loss" in what else "")
    return Measured(quantities, details)
