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
from scipy import stats
from torch import Tensor

from attnlab.compare.layers import Layer, build_layer, random_input

Direction = Literal["forward", "training", "decode"]
"""One pass over all tokens without gradients (prefill), the same with gradients, or one more token after them."""
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
        ratio_from: lower end of a 95 % interval of the median ratio.
        ratio_to: its upper end.
        pairs: how many pairs.
    """

    seconds: float
    low: float
    high: float
    baseline: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_from: float
    ratio_to: float
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


def median_interval(values: list[float]) -> tuple[float, float]:
    """The values between which the median lies with probability 0.95 or more, whatever their distribution; with fewer than six,
    the least and the greatest, which cover it less often."""
    ordered, count = sorted(values), len(values)
    outside = int(stats.binom.ppf(0.025, count, 0.5))
    return ordered[max(0, outside - 1)], ordered[min(count - 1, count - outside)]


def clock_of(device: str) -> Callable[[], float]:
    """Seconds so far, once all that the device was given to do is done."""
    if torch.device(device).type != "cuda":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


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
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio_low, ratio, ratio_high = quartiles(ratios)
    return PairTimes(middle, low, high, quartiles(theirs)[1], ratio, ratio_low, ratio_high, *median_interval(ratios), len(ours))


def _warm_up(function: Callable[[], object], clock: Callable[[], float]) -> int:
    """Call twice; how often to call it so that a sample is long enough, from the second."""
    function()
    start = clock()
    function()
    return max(1, math.ceil(SHORTEST / max(clock() - start, 1e-9)))


def layer_call(layer: Layer, tokens: int, direction: Direction) -> Callable[[], object]:
    """A function that runs the layer once: without gradients, forward and backward in training mode, or on one more token."""
    mixer = build_layer(layer, tokens)
    x, grid = random_input(layer, tokens)
    if direction == "decode":
        return _decode_call(mixer.eval(), x)
    if direction == "forward":
        mixer.eval()

        def forward() -> object:
            with torch.no_grad():
                return mixer(x, grid=grid)

        return forward
    x.requires_grad_()
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    wanted = [x, *(p for p in mixer.parameters() if p.requires_grad)]

    def training() -> object:
        return torch.autograd.grad(mixer(x, grid=grid), wanted, cotangent, allow_unused=True)

    return training


def _decode_call(mixer: Any, x: Tensor) -> Callable[[], object]:
    """One token after all of ``x``; the state stays as it is, so that every call does the same."""
    with torch.no_grad():
        _, state = mixer.extend(x, mixer.init_state(len(x)))

    def decode() -> object:
        with torch.no_grad():
            return mixer.extend(x[:, :1], state)[0]

    return decode


def time_layer(layer: Layer, tokens: int, direction: Direction, *, seconds: float, pairs: int) -> PairTimes:
    """Time a layer against softmax attention of the same size at one length."""
    ours, theirs = layer_call(layer, tokens, direction), layer_call(layer.baseline, tokens, direction)
    collecting = gc.isenabled()
    gc.disable()
    try:
        return time_pairs(ours, theirs, seconds=seconds, pairs=pairs, clock=clock_of(layer.device))
    finally:
        if collecting:
            gc.enable()
