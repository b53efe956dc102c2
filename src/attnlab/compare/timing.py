"""Times of a mixer layer and of softmax attention of the same size, in interleaved pairs."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from attnlab.compare.layers import Layer, build_layer, random_input

Direction = Literal["forward", "training"]
SHORTEST = 2e-3
"""Seconds that one sample lasts at least: faster calls are repeated within it."""


@dataclass(frozen=True)
class PairTimes:
    """Seconds a call of two functions measured in turn, and their ratio pair by pair.

    Args:
        seconds: the candidate's median.
        low: its first quartile.
        high: its third quartile.
        baseline: the baseline's median.
        ratio: median of candidate over baseline.
        ratio_low: first quartile of it.
        ratio_high: third quartile of it.
        pairs: how many pairs.
    """

    seconds: float
    low: float
    high: float
    baseline: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def time_pairs(
    candidate: Callable[[], object],
    baseline: Callable[[], object],
    *,
    seconds: float,
    pairs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> PairTimes:
    """Time two functions in turn, so that whatever else the machine does meets both; who goes first alternates.

    Args:
        candidate: what is measured.
        baseline: what it is measured against.
        seconds: stop after about this long,
        pairs: but not before this many pairs.
        clock: seconds so far; the tests give their own.
    """
    repeats = {function: _warm_up(function, clock) for function in (candidate, baseline)}

    def sample(function: Callable[[], object]) -> float:
        start = clock()
        for _ in range(repeats[function]):
            function()
        return (clock() - start) / repeats[function]

    ours: list[float] = []
    theirs: list[float] = []
    begun = clock()
    while len(ours) < pairs or clock() - begun < seconds:
        if len(ours) % 2:
            theirs.append(sample(baseline))
            ours.append(sample(candidate))
        else:
            ours.append(sample(candidate))
            theirs.append(sample(baseline))
    low, middle, high = quartiles(ours)
    ratio_low, ratio, ratio_high = quartiles([a / b for a, b in zip(ours, theirs, strict=True)])
    return PairTimes(middle, low, high, quartiles(theirs)[1], ratio, ratio_low, ratio_high, len(ours))


def _warm_up(function: Callable[[], object], clock: Callable[[], float]) -> int:
    """Call twice; how often to call it so that a sample is long enough, from the second."""
    function()
    start = clock()
    function()
    return max(1, math.ceil(SHORTEST / max(clock() - start, 1e-9)))


def layer_call(layer: Layer, tokens: int, direction: Direction) -> Callable[[], object]:
    """A function that runs the layer once: forward without gradients, or forward and backward in training mode."""
    mixer = build_layer(layer, tokens)
    x, grid = random_input(layer, tokens)
    if direction == "forward":
        mixer.eval()

        def forward() -> object:
            with torch.no_grad():
                return mixer(x, grid=grid)

        return forward
    x.requires_grad_()
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    wanted = [x, *(p for p in mixer.parameters() if p.requires_grad)]

    def training() -> object:
        return torch.autograd.grad(mixer(x, grid=grid), wanted, cotangent, allow_unused=True)

    return training


def time_layer(layer: Layer, tokens: int, direction: Direction, *, seconds: float, pairs: int) -> PairTimes:
    """Time a layer against softmax attention of the same size at one length."""
    ours, theirs = layer_call(layer, tokens, direction), layer_call(layer.baseline, tokens, direction)
    collecting = gc.isenabled()
    gc.disable()
    try:
        return time_pairs(ours, theirs, seconds=seconds, pairs=pairs)
    finally:
        if collecting:
            gc.enable()
