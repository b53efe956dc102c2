"""Law 6: the fast path is the reference; no tolerance is tuned, a float64 run is the oracle."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch

from attnlab.checking.bench import Bench, Inputs, Measured, Trial, measure
from attnlab.checking.draw import MASKS
from attnlab.checking.outcome import Violation
from attnlab.checking.require import CANCELLED, FORWARD, require, require_close, require_finite, require_same
from attnlab.checking.suite import conformance
from attnlab.core.contract import Mixer
from attnlab.ops.backends import use_backend

FACTOR, ULPS = 4.0, 1.0
"""The fast path's error may be this many times that of the reference in the same dtype, plus this many ulps."""
DRAWS = 8
"""Inputs of which one has to keep the budget where the mixer is discontinuous."""


def reference(mixer: Mixer, inputs: Inputs) -> Measured:
    """`measure` with every op on the reference backend."""
    with use_backend("reference"):
        return measure(mixer, inputs)


def _arguments(bench: Bench, trial: Trial) -> Iterator[tuple[str, Inputs]]:
    """The trial's input, plainly and with every argument that the mixer takes."""
    inputs, supports = trial.inputs, bench.supports
    batch, n = inputs.x.shape[:2]
    yield "plain", inputs
    if supports.mask:
        kind = MASKS[bench.draw.integer(0, 2)]
        yield f"masked on the {kind}", replace(inputs, mask=bench.draw.mask(kind, batch, n))
    if supports.pair_mask:
        yield "pair_mask", replace(inputs, pair_mask=bench.draw.pair_mask(1, trial.mixer.num_heads, n, n))
    if supports.cross and not trial.causal:
        yield "context", replace(inputs, context=bench.context_for(trial))


@conformance(law=6, promise="contract")
def precision_float64(bench: Bench) -> str:
    """In float64 the fast path equals the reference to 1e-9, its gradients of inputs and parameters to 1e-8."""
    for trial in bench.trials():
        for said, inputs in _arguments(bench, trial):
            require_same(f"{trial}, {said}, against the reference", measure(trial.mixer, inputs), reference(trial.mixer, inputs))
    return bench.said()


@conformance(law=6, promise="contract")
def precision_float32(bench: Bench) -> str:
    """In float32 the error against float64 is at most a small factor of that of the reference."""
    return _low_precision(bench, torch.float32)


@conformance(law=6, promise="contract")
def precision_bfloat16(bench: Bench) -> str:
    """In bfloat16 the error against float64 is at most a small factor of that of the reference."""
    return _low_precision(bench, torch.bfloat16)


@conformance(law=6, promise="contract")
def precision_autocast(bench: Bench) -> str:
    """A float32 mixer runs under autocast to bfloat16, with an error of at most a small factor of that of the reference."""
    return _low_precision(bench, torch.float32, autocast=True)


def _low_precision(bench: Bench, dtype: torch.dtype, *, autocast: bool = False) -> str:
    worst = 0.0
    # Rounding may flip a choice, in either form and not in the other; what is wrong with a form shows on every input.
    draws = DRAWS if bench.supports.discontinuous else 1
    for trial in bench.trials():
        for draw in range(draws):
            try:
                worst = max(worst, _worst(bench, trial, dtype, autocast))
                break
            except Violation:
                if draw == draws - 1:
                    raise
                inputs = trial.inputs.map_tokens(lambda tokens: bench.draw.normal(*tokens.shape))
                trial = replace(trial, inputs=inputs)
    return f"{bench.said()}; at most {worst:.0%} of the budget"


def _worst(bench: Bench, trial: Trial, dtype: torch.dtype, autocast: bool) -> float:
    """The largest share of the budget that an error of this trial takes."""
    worst, ulp = 0.0, torch.finfo(torch.bfloat16 if autocast else dtype).eps
    low = copy.deepcopy(trial.mixer).to(dtype)
    exact = copy.deepcopy(low).to(torch.float64)
    for said, inputs in _arguments(bench, trial):
        rounded = inputs.map_tokens(lambda tokens: tokens.to(dtype))
        oracle = reference(exact, rounded.map_tokens(lambda tokens: tokens.to(torch.float64)))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fast, plain = _errors(measure(low, rounded), oracle), _errors(reference(low, rounded), oracle)
        for part, error in fast.items():
            budget = FACTOR * plain[part] + ULPS * ulp
            worst = max(worst, error / budget)
            have, allowed = f"{error / ulp:.3g} ulps", f"{plain[part] / ulp:.3g}"
            require(error <= budget, f"{trial}, {said}: {part} is off by {have}, that of the reference in {dtype} by {allowed}")
    return worst


def _errors(got: Measured, oracle: Measured) -> dict[str, float]:
    """Relative root-mean-square error of the output, of the gradient of the inputs, and of that of all parameters together."""
    parts = {"the output": ([got.output], [oracle.output])}
    for part, chosen in (("the gradient of the inputs", True), ("the gradient of the parameters", False)):
        names = [name for name in oracle.gradients if (name in ("x", "context")) is chosen]
        parts[part] = [got.gradients[name] for name in names], [oracle.gradients[name] for name in names]
    errors = {}
    for part, (mine, exact) in parts.items():
        if not mine:
            continue
        a, b = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (mine, exact))
        error, size = float((a - b).norm()), max(float(b.norm()), CANCELLED * b.numel() ** 0.5)
        errors[part] = float("inf") if error != error else error / size
    return errors


@conformance(law=6, promise="contract")
def awkward_lengths(bench: Bench) -> str:
    """One token, three, and lengths beside multiples of a tile run, and equal the reference."""
    for mixer in bench.mixers():
        for rank in sorted(bench.supports.grid):
            for length in bench.profile.lengths:
                grid = (*[1] * (rank - 2), *([length, 1] if rank > 1 else [length]))
                sized = bench.sized(mixer, grid)
                inputs = bench.inputs(sized, grid, batch=1)
                with torch.no_grad(), use_backend("reference"):
                    expected = inputs.apply(sized)
                got = measure(sized, inputs)
                said = f"causal={mixer.causal}, n={length}, grid {inputs.grid}"
                require_close(f"{said}, against the reference", got.output, expected, FORWARD)
                for name, gradient in got.gradients.items():
                    require_finite(f"{said}: the gradient of {name}", gradient)
    return bench.said()
