"""What streaming costs as a sequence grows: state and time, token by token and at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnlab.claims.cells import Cells
from attnlab.claims.quantity import Measured, over
from attnlab.compare.layers import Layer, build_layer, random_input
from attnlab.compare.timing import layer_call
from attnlab.core.errors import UnsupportedError
from attnlab.core.streaming import StreamingMixer
from attnlab.ops.linear_attention import linear_attention

SHORTEST = 0.05
"""Processor seconds that a sample of `per_token` lasts at least."""


def stream(layer: Layer, marks: Sequence[int]) -> dict[str, Any]:
    """Feed a mixer one token after another: processor seconds so far and bytes of state after each number of ``marks``."""
    mixer = build_layer(layer, marks[-1]).eval()
    if not isinstance(mixer, StreamingMixer):
        raise UnsupportedError(layer.name, "streaming")
    tokens, _ = random_input(layer, 1)
    state, seconds, sizes = mixer.init_state(layer.batch_size), [], []
    start = time.process_time()
    with torch.no_grad():
        for t in range(1, marks[-1] + 1):
            _, state = mixer.extend(tokens, state)
            if t in marks:
                seconds.append(time.process_time() - start)
                sizes.append(state.nbytes)
    return {"seconds": seconds, "bytes": sizes}


def cumulative(
    cells: Cells, *, mixer: str, against: str, dim: int, num_heads: int, marks: Sequence[int], passes: int
) -> Measured:
    """How state and cumulative time grow over the last doubling of a stream, of a mixer and of another.

    A quantity that grows as n^a has exponent a: 0 for what stays, 1 for a line, 2 for a square. Time is the process's own, so
    that other work on the machine does not count.

    Quantities: "time" and "state", exponents of ``mixer``; "other_time" and "other_state", of ``against``.

    Args:
        cells: keeps each pass.
        mixer: what is measured.
        against: what it is measured against.
        dim: width.
        num_heads: heads.
        marks: numbers of tokens after which the clock is read, the last two in the ratio 1 : 2.
        passes: how often.
    """
    quantities, details = {}, {}
    for prefix, name in (("", mixer), ("other_", against)):
        settings = {"mixer": name, "dim": dim, "num_heads": num_heads, "marks": list(marks)}
        layer = Layer(name, True, dim, num_heads)
        runs = []
        for number in range(passes):
            label = f"streaming {name}, {marks[-1]} tokens, pass {number}"
            runs.append(cells(label, settings, lambda layer=layer: stream(layer, marks)))  # type: ignore[misc]
        quantities[f"{prefix}time"] = over([math.log2(run["seconds"][-1] / run["seconds"][-2]) for run in runs])
        quantities[f"{prefix}state"] = over([math.log2(run["bytes"][-1] / run["bytes"][-2]) for run in runs])
        details[name] = {"marks": list(marks), "passes": runs}
    return Measured(quantities, details)


def per_token(function: Callable[[], object], tokens: int) -> float:
    """Processor microseconds a token of a call, over as many calls as `SHORTEST` wants."""
    function()
    calls, start = 0, time.process_time()
    while calls == 0 or time.process_time() - start < SHORTEST:
        function()
        calls += 1
    return (time.process_time() - start) / calls / tokens * 1e6


def constant_speed(
    cells: Cells, *, mixer: str, against: str, dim: int, num_heads: int, lengths: Sequence[int], passes: int
) -> Measured:
    """Time a token of a layer in training (forward and backward) at rising lengths.

    Quantities: "growth" of ``mixer`` and "other_growth" of ``against``: time a token at the longest over that at the shortest;
    "microseconds", a token at the longest.

    Args:
        cells: keeps each pass.
        mixer: what is measured.
        against: what it is measured against.
        dim: width.
        num_heads: heads.
        lengths: tokens, rising.
        passes: how often.
    """

    def measure(layer: Layer) -> dict[str, Any]:
        return {str(n): per_token(layer_call(layer, n, "training"), n) for n in lengths}

    quantities, details = {}, {}
    for prefix, name in (("", mixer), ("other_", against)):
        layer = Layer(name, True, dim, num_heads)
        settings = {"mixer": name, "dim": dim, "num_heads": num_heads, "lengths": list(lengths)}
        runs = []
        for number in range(passes):
            label = f"time a token of {name}, pass {number}"
            runs.append(cells(label, settings, lambda layer=layer: measure(layer)))  # type: ignore[misc]
        ends = str(lengths[-1]), str(lengths[0])
        quantities[f"{prefix}growth"] = over([run[ends[0]] / run[ends[1]] for run in runs])
        details[name] = {"microseconds_per_token": runs}
        if not prefix:
            quantities["microseconds"] = over([run[ends[0]] for run in runs], unit="µs")
    return Measured(quantities, details)


def exactness(cells: Cells, *, tokens: int, head_dim: int, num_heads: int, draws: int) -> Measured:
    """How far the tiled form of linear attention with decay is from the recurrence, in float32 and relative to its size.

    Quantities: "error", of the outputs, and "gradient_error", of the gradients with respect to q, k and v.

    Args:
        cells: keeps each draw.
        tokens: length.
        head_dim: width of a head.
        num_heads: heads, with decays by the ALiBi rule.
        draws: random inputs.
    """

    def measure(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(1, num_heads, tokens, head_dim, generator=generator, requires_grad=True) for _ in range(3)]
        cotangent = torch.randn(1, num_heads, tokens, head_dim, generator=generator)
        decay = -(2.0 ** (-8.0 * torch.arange(1, num_heads + 1) / num_heads))

        def run(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
            q, k, v = inputs
            out, _ = linear_attention(q, k, v, log_decay=decay, backend=backend)
            grads = torch.autograd.grad(out, inputs, cotangent)
            return out.detach(), torch.cat([g.flatten() for g in grads])

        tiled, recurrent = run("eager"), run("reference")
        apart = [float((a - b).norm() / b.norm()) for a, b in zip(tiled, recurrent, strict=True)]
        return {"output": apart[0], "gradient": apart[1]}

    settings = {"tokens": tokens, "head_dim": head_dim, "num_heads": num_heads}
    runs = [
        cells(f"tiled against recurrent, draw {seed}", {**settings, "seed": seed}, lambda seed=seed: measure(seed))  # type: ignore[misc]
        for seed in range(draws)
    ]
    quantities = {"error": over([run["output"] for run in runs]), "gradient_error": over([run["gradient"] for run in runs])}
    return Measured(quantities, {"draws": runs})
