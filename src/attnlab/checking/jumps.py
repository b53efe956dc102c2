"""Law 7, of choices: where an output may jump, and where it may not."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from attnlab.checking.bench import Bench, Trial
from attnlab.checking.require import distance, require
from attnlab.checking.suite import conformance

STEPS, HALVINGS, PLACES = 32, 40, 3
JUMP = 1e-5
"""A change of the output, relative to its size, that is left when the inputs have become equal to a trillionth: a jump."""


def jump(bench: Bench, trial: Trial) -> float:
    """The largest relative change of the output found on the way from the trial's input to another, over a step of 2^-45."""
    start, mixer = trial.inputs, trial.mixer
    # Some channels of the other input are large, so that what compares sizes comes to other conclusions too.
    end = bench.draw.normal(*start.x.shape) * bench.draw.normal(start.x.shape[-1]).mul(2.0).exp()

    def at(t: float) -> torch.Tensor:
        with torch.no_grad():
            return replace(start, x=torch.lerp(start.x, end, t)).apply(mixer)

    outputs = [at(step / STEPS) for step in range(STEPS + 1)]
    size = max(float(y.abs().max()) for y in outputs)
    changes = [distance(a, b) for a, b in pairwise(outputs)]
    largest = 0.0
    for step in sorted(range(STEPS), key=lambda step: -changes[step])[:PLACES]:
        low, high = step / STEPS, (step + 1) / STEPS
        below, above = outputs[step], outputs[step + 1]
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            y = at(middle)
            if distance(below, y) >= distance(y, above):
                high, above = middle, y
            else:
                low, below = middle, y
        largest = max(largest, distance(below, above) / max(size, 1e-30))
    return largest


@conformance(law=7, promise="discontinuous")
def jumps(bench: Bench) -> str:
    """Discontinuous means that there is a jump on the way from one input to another; otherwise the flag lies."""
    found = 0.0
    for trial in (*bench.trials(), *bench.trials(), *bench.trials()):
        found = max(found, jump(bench, trial))
    require(found > JUMP, f"no jump was found (at most {found:.3g} of the output): declare discontinuous=False")
    return f"a jump of {found:.2g} of the output"


@conformance(law=7, promise="refusals", when=lambda supports: not supports.discontinuous)
def continuous(bench: Bench) -> str:
    """Without that flag there is no jump: inputs that become equal have outputs that do."""
    for trial in bench.trials():
        found = jump(bench, trial)
        require(found <= JUMP, f"{trial}: the output jumps by {found:.3g} of its size: declare discontinuous=True")
    return bench.said()
