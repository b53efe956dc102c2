"""Time an op of this package in pairs with SDPA of the same size, once its outputs and gradients have matched the reference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

HEADS, WIDTH = 8, 32
LENGTHS = (1024, 2048, 4096, 8192, 16384)

Run = Callable[..., tuple[Tensor, Tensor]]


def seconds(run: Callable[[], Tensor], inputs: list[Tensor], weights: Tensor) -> tuple[float, float]:
    """Seconds of the forward alone, and of forward and backward."""
    start = time.perf_counter()
    out = run()
    middle = time.perf_counter()
    torch.autograd.grad(out, inputs, weights)
    return middle - start, time.perf_counter() - start


def check(op: Run, inputs: list[Tensor]) -> float:
    """Largest relative difference, eager to reference, of output, last state and gradients in float32."""
    weights = torch.randn(inputs[2].shape)
    found = []
    for backend in ("eager", "reference"):
        o, state = op(*inputs, backend=backend)
        found.append((o.detach(), state.detach(), *torch.autograd.grad(o, inputs, weights)))
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
    if worst > 1e-4:
        raise AssertionError(f"eager and reference differ by {worst:.1e}: a speed would mean nothing")
    return worst


def measure(op: Run, inputs: list[Tensor], length: int) -> tuple[float, float, float, float]:
    """Seconds forward and forward with backward, and their ratios to SDPA's, as medians over pairs."""
    weights = torch.randn(1, HEADS, length, WIDTH)
    q, k, v = (torch.randn(1, HEADS, length, WIDTH, requires_grad=True) for _ in range(3))
    pairs = []
    for _ in range(3 if length > 8192 else 9):
        softmax = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], weights)
        ours = seconds(lambda: op(*inputs, backend="eager")[0], inputs, weights)
        pairs.append((*ours, ours[0] / softmax[0], ours[1] / softmax[1]))
    forward, both, ratio_forward, ratio_both = (statistics.median(column) for column in zip(*pairs, strict=True))
    return forward, both, ratio_forward, ratio_both


def compare(name: str, op: Run, draw: Callable[[int], list[Tensor]], lengths: tuple[int, ...] = LENGTHS) -> None:
    """Print a line for each length, after the reference has been matched at the shortest."""
    inputs = [x.requires_grad_() for x in draw(lengths[0])]
    print(f"{name}: eager is within {check(op, inputs):.0e} of the reference, {lengths[0]} tokens")
    for length in lengths:
        inputs = [x.requires_grad_() for x in draw(length)]
        forward, both, ratio_forward, ratio_both = measure(op, inputs, length)
        print(
            f"{name:16} n {length:6}  {forward * 1e3:7.1f} ms forward  {both * 1e3:7.1f} ms with backward  "
            f"of SDPA {ratio_forward:.3f} / {ratio_both:.3f}"
        )


def step(name: str, op: Run, inputs: list[Tensor], state: Tensor) -> None:
    """Print the microseconds of one decoded token, the median of 500."""
    times = []
    with torch.no_grad():
        for _ in range(500):
            start = time.perf_counter()
            op(*inputs, initial_state=state, backend="eager")
            times.append(time.perf_counter() - start)
    print(f"{name:16} one token  {statistics.median(times) * 1e6:.0f} us")
