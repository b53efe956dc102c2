"""Everything that is measured of one mixer layer: its gate first, then times, memory and counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from attnlab.compare.cost import layer_flops, state_bytes
from attnlab.compare.costs import LayerCosts, costs_of
from attnlab.compare.gate import gate
from attnlab.compare.layers import Layer, can_be_causal, can_stream
from attnlab.compare.memory import peak_bytes
from attnlab.compare.suites import MixerChoice, Timing
from attnlab.compare.timing import Direction, time_layer
from attnlab.core.catalog import mixer_info
from attnlab.core.errors import UnsupportedError

DIRECTIONS: tuple[Direction, ...] = ("forward", "training", "decode")
WEIGHED: tuple[Direction, ...] = ("forward", "training")
"""Directions whose peak memory is measured; that of a decoding step is its state."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch runs on ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(layer: Layer, timing: Timing, check: Callable[[], None]) -> dict[str, Any]:
    """The result of a timing cell; a layer that does not pass its gate has no times.

    Args:
        layer: what is measured.
        timing: at which lengths and for how long.
        check: called before each measurement; raises to stop.
    """
    agreed = gate(layer)
    result: dict[str, Any] = {"gate": agreed.record(), "causal": layer.causal, "threads": timing.threads}
    if not agreed.passed:
        return result
    for direction in DIRECTIONS:
        if direction == "decode" and not can_stream(layer):
            continue
        times = {}
        with threads(timing.threads):
            for length in timing.lengths:
                check()
                found = time_layer(layer, length, direction, seconds=timing.seconds, pairs=timing.pairs)
                times[str(length)] = found.record()
        result[direction] = times
        if direction in WEIGHED:
            peaks = {str(length): peak_bytes(layer, length, direction) for length in timing.memory_lengths}
            result[f"{direction}_memory"] = peaks
    result["flops"] = {str(length): layer_flops(layer, length) for length in timing.lengths}
    ends = sorted({timing.lengths[0], timing.lengths[-1]})
    result["state_bytes"] = {str(length): state_bytes(layer, length) for length in ends}
    return result


def bench(
    mixers: Sequence[MixerChoice],
    timing: Timing,
    *,
    causal: bool | None = None,
    started: Callable[[str], None] = lambda label: None,
) -> list[LayerCosts]:
    """Measure mixers one after another, without a ledger.

    Args:
        mixers: what to measure.
        timing: at which lengths and for how long.
        causal: which form; None takes the causal one where there is one.
        started: called with the label of each mixer before it is measured.

    Raises:
        UnsupportedError: for a mixer that does not have the form asked for.
    """
    layers = []
    for mixer in mixers:
        have = mixer_info(mixer.name).supports.causal
        if causal is not None and have == ("no" if causal else "always"):
            raise UnsupportedError(mixer.name, f"causal={causal}", f"its causal form is {have!r}")
        form = can_be_causal(mixer.name) if causal is None else causal
        layers.append(Layer(mixer.name, form, timing.dim, timing.num_heads, timing.batch_size, mixer.options, timing.device))
    found = []
    for mixer, layer in zip(mixers, layers, strict=True):
        started(mixer.label)
        found.append(costs_of(mixer.label, measure(layer, timing, lambda: None)))
    return found
