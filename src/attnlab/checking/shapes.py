"""The promises of grids and sizes, and tensor in, tensor out."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from attnlab.checking.bench import Bench, measure
from attnlab.checking.outcome import Violation
from attnlab.checking.require import require, require_finite
from attnlab.checking.suite import conformance

_GRIDS = {
    1: ((5,), (12,)),
    2: ((1, 6), (6, 1), (3, 5), (5, 2)),
    3: ((1, 1, 4), (2, 3, 1), (2, 4, 3)),
}


@conformance(law=0, promise="grid")
def grid_ranks(bench: Bench) -> str:
    """Every promised rank runs forward and backward on grids of unequal sides, sides of one too."""
    for mixer in bench.mixers():
        for rank in sorted(bench.supports.grid):
            for grid in _GRIDS[rank]:
                sized = bench.sized(mixer, grid)
                inputs = replace(bench.inputs(sized, grid), grid=grid)
                got = measure(sized, inputs)
                said = f"causal={mixer.causal}, grid {grid}"
                require(got.output.shape == inputs.x.shape, f"{said}: expected the shape of x, got {tuple(got.output.shape)}")
                require_finite(f"{said}: the output", got.output)
                for name, gradient in got.gradients.items():
                    require_finite(f"{said}: the gradient of {name}", gradient)
    return bench.said()


@conformance(law=0, promise="grid", when=lambda supports: 1 in supports.grid)
def grid_of_rank_one(bench: Bench) -> str:
    """No grid and the grid (n,) are the same."""
    for trial in bench.trials(ranks=(1,)):
        n = trial.inputs.x.shape[1] - trial.mixer.num_prefix
        with torch.no_grad():
            same = torch.equal(replace(trial.inputs, grid=(n,)).apply(trial.mixer), trial.inputs.apply(trial.mixer))
        require(same, f"{trial}: grid=({n},) gives another output than grid=None")
    return bench.said()


@conformance(law=0, promise="contract")
def single_token(bench: Bench) -> str:
    """One token alone runs forward and backward."""
    for mixer in bench.mixers():
        for rank in sorted(bench.supports.grid):
            sized = bench.sized(mixer, (1,) * rank)
            got = measure(sized, bench.inputs(sized, (1,) * rank))
            require_finite(f"causal={mixer.causal}, one token, rank {rank}: the output", got.output)
            for name, gradient in got.gradients.items():
                require_finite(f"causal={mixer.causal}, one token, rank {rank}: the gradient of {name}", gradient)
    return bench.said()


@conformance(law=0, promise="contract")
def tensor_in_tensor_out(bench: Bench) -> str:
    """The output is one new tensor of x's shape, dtype and device; x is left as it was; evaluation changes no buffer."""
    for trial in bench.trials():
        mixer = copy.deepcopy(trial.mixer)
        before = {name: value.clone() for name, value in mixer.state_dict().items()}
        x = trial.inputs.x.clone()
        with torch.no_grad():
            output: object = mixer(x, grid=trial.inputs.grid)
        if not isinstance(output, Tensor):
            raise Violation(f"{trial}: expected one tensor, got {type(output).__name__}")
        for what, got, expected in (
            ("shape", tuple(output.shape), tuple(x.shape)),
            ("dtype", output.dtype, x.dtype),
            ("device", output.device, x.device),
        ):
            require(got == expected, f"{trial}: expected the {what} of x, {expected}, got {got}")
        require(torch.equal(x, trial.inputs.x), f"{trial}: the forward pass changed x")
        for name, value in mixer.state_dict().items():
            require(torch.equal(value, before[name]), f"{trial}: a forward pass in evaluation mode changed {name!r}")
    return bench.said()
