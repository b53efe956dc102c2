"""Ranks of what linear attention sums up and of what it gives out, in a small trained encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.claims.cells import Cells
from attnlab.claims.quantity import Measured, over
from attnlab.core.masks import Masks
from attnlab.mixers.linear.rala import RankAugmentedLinearAttention
from attnlab.tasks import create_task, reference_model
from attnlab.training import evaluate, train

IMAGES = 64
"""Test images over which ranks are averaged."""


def share_of_full_rank(x: Float[Tensor, "*b r c"], tolerance: float) -> float:
    """Mean share of a matrix's singular values above ``tolerance`` times its largest."""
    values = torch.linalg.svdvals(x.double())
    return float((values > tolerance * values[..., :1]).double().mean())


class _Inputs:
    """What every RALA layer of a model was given in a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [part for part in model.modules() if isinstance(part, RankAugmentedLinearAttention)]
        self.given: list[Tensor] = []
        self._hooks = [layer.register_forward_pre_hook(self._keep) for layer in self.layers]

    def _keep(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.given.append(arguments[0])

    def close(self) -> None:
        """Listen no more."""
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def ranks(model: nn.Module, inputs: Tensor, tolerance: float) -> dict[str, float]:
    """Shares of full rank, means over layers: of the heads' sums of outer products, and of the outputs without their bias."""
    listener = _Inputs(model)
    model.eval()(inputs)
    listener.close()
    sums, outputs = [], []
    for layer, x in zip(listener.layers, listener.given, strict=True):
        q, k, v = layer.project(x)
        keys = layer.weigh_keys(layer.features(q), layer.features(k), Masks())
        sums.append(share_of_full_rank(keys.mT @ v, tolerance))
        outputs.append(share_of_full_rank(layer(x, grid=(8, 8)) - layer.out_proj.bias, tolerance))
    return {"sums": sum(sums) / len(sums), "output": sum(outputs) / len(outputs)}


def probe(options: Mapping[str, Any], *, seed: int, dim: int, steps: int, rate: float, tolerance: float) -> dict[str, Any]:
    """Train an encoder of two layers on digits of 64 tokens; ranks before and after, and its accuracy."""
    task = create_task("digits", patch=1)
    model = reference_model(task, "rala", dim=dim, depth=2, num_heads=2, mixer_options=dict(options), seed=seed).model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    inputs = next(task.eval_batches(IMAGES, "test")).inputs
    before = ranks(model, inputs, tolerance)
    train(model.train(), task, steps=steps, batch_size=32, learning_rate=rate, seed=seed, eval_split=None)
    return {"before": before, "after": ranks(model, inputs, tolerance), "accuracy": evaluate(model, task, "test")["accuracy"]}


def augmentation(
    cells: Cells,
    *,
    plain: Mapping[str, Any],
    weighed: Mapping[str, Any],
    gated: Mapping[str, Any],
    dim: int,
    steps: int,
    rate: float,
    tolerance: float,
    seeds: int,
) -> Measured:
    """Shares of full rank in trained encoders that differ in RALA's options alone.

    Quantities: "plain_sums" and "plain_output" without either augmentation, "full_sums" and "full_output" with both;
    "sums_gain" of the token weights and "output_gain" of both, paired by seed.

    Args:
        cells: keeps each training run.
        plain: options of RALA without augmentations.
        weighed: with the token weights.
        gated: with the token weights and the gate.
        dim: width, with two heads.
        steps: of training.
        rate: its learning rate.
        tolerance: singular values below this share of the largest count as none.
        seeds: runs of each.
    """

    def run(label: str, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
        settings = {"options": dict(options), "seed": seed, "dim": dim, "steps": steps, "rate": rate, "tolerance": tolerance}

        def work() -> dict[str, Any]:
            return probe(options, seed=seed, dim=dim, steps=steps, rate=rate, tolerance=tolerance)

        return cells(f"digits with RALA, {label}, seed {seed}", settings, work)

    subjects = {"plain": plain, "weighed": weighed, "gated": gated}
    runs = {label: [run(label, options, seed) for seed in range(seeds)] for label, options in subjects.items()}

    def column(label: str, what: str) -> list[float]:
        return [result["after"][what] for result in runs[label]]

    def gain(label: str, what: str) -> list[float]:
        return [ours - theirs for ours, theirs in zip(column(label, what), column("plain", what), strict=True)]

    quantities = {
        "plain_sums": over(column("plain", "sums")),
        "plain_output": over(column("plain", "output")),
        "full_sums": over(column("gated", "sums")),
        "full_output": over(column("gated", "output")),
        "sums_gain": over(gain("gated", "sums")),
        "output_gain": over(gain("gated", "output")),
    }
    return Measured(quantities, runs)
