"""Law 5: an example's output does not depend on its neighbours in the batch."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from attnlab.checking.bench import Bench, Inputs, Trial
from attnlab.checking.require import FORWARD, distance, require, require_close
from attnlab.checking.suite import conformance
from attnlab.core.contract import Mixer

_NEIGHBOURS = 8  # other batches that an example is put into


def _neighbour_gradient(mixer: Mixer, inputs: Inputs) -> float:
    """Largest gradient of the first example's output with respect to the other examples' inputs."""
    x = inputs.x.detach().clone().requires_grad_()
    first = replace(inputs, x=x).apply(mixer)[0]
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((first * direction.to(first.dtype)).sum(), x, materialize_grads=True)
    return float(gradient[1:].abs().max())


def _coupling(trial: Trial) -> dict[str, float]:
    """`_neighbour_gradient` in evaluation and in training mode."""
    training = copy.deepcopy(trial.mixer).train()
    return {
        "evaluation": _neighbour_gradient(trial.mixer, trial.inputs),
        "training": _neighbour_gradient(training, trial.inputs),
    }


@conformance(law=5, promise="contract", when=lambda supports: not supports.batch_coupled)
def batch_independence(bench: Bench) -> str:
    """Alone or among neighbours, even with NaN in them, an example has the same output; none of its gradient reaches them."""
    for trial in bench.trials(batch=3):
        for mode, leak in _coupling(trial).items():
            require(leak == 0.0, f"{trial}, {mode}: an output depends on another example of the batch (gradient {leak:.3g})")
        x = trial.inputs.x
        poisoned = x.clone()
        poisoned[1] = float("nan")
        with torch.no_grad():
            together = trial.inputs.apply(trial.mixer)
            beside_nan = replace(trial.inputs, x=poisoned).apply(trial.mixer)
            for i in range(3):
                alone = replace(trial.inputs, x=x[i : i + 1]).apply(trial.mixer)
                require_close(f"{trial}: example {i} alone", alone[0], together[i], FORWARD)
                if i != 1:
                    require_close(f"{trial}: example {i} beside one of NaN", beside_nan[i], together[i], FORWARD)
    return bench.said()


@conformance(law=5, promise="contract", when=lambda supports: supports.mask and not supports.batch_coupled)
def batch_independence_masked(bench: Bench) -> str:
    """With a mask of its own in each example, alone or among neighbours, an example has the same output."""
    for trial in bench.trials(batch=3):
        x = trial.inputs.x
        mask = bench.draw.mask("inside", *x.shape[:2])
        with torch.no_grad():
            together = replace(trial.inputs, mask=mask).apply(trial.mixer)
            for i in range(3):
                alone = replace(trial.inputs, x=x[i : i + 1], mask=mask[i : i + 1]).apply(trial.mixer)
                require_close(f"{trial}: example {i} alone, with a mask", alone[0], together[i], FORWARD)
    return bench.said()


@conformance(law=5, promise="batch_coupled")
def batch_coupled(bench: Bench) -> str:
    """An output does depend on its neighbours, in training or in evaluation mode; otherwise the flag has to go."""
    strongest = max(max(max(_coupling(trial).values()), _change(bench, trial)) for trial in bench.trials(batch=3))
    require(strongest > 0.0, "declared batch_coupled, but no output depends on another example: declare batch_coupled=False")
    return bench.said()


def _change(bench: Bench, trial: Trial) -> float:
    """How far the first example's output moves with other neighbours, for what they decide without a gradient."""
    x, moved = trial.inputs.x, 0.0
    with torch.no_grad():
        before = trial.inputs.apply(trial.mixer)[0]
        for _ in range(_NEIGHBOURS):
            # Some channels are large, so that what compares sizes comes to other conclusions.
            others = bench.draw.normal(*x[1:].shape) * bench.draw.normal(x.shape[-1]).mul(2.0).exp()
            after = replace(trial.inputs, x=torch.cat((x[:1], others))).apply(trial.mixer)[0]
            moved = max(moved, distance(before, after))
    return moved
