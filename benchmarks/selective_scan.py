"""The selective scan, its log-step form and SDPA in turns: `GOMP_SPINCOUNT=20000 python benchmarks/selective_scan.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from pairs import HEADS, WIDTH, seconds
from torch import Tensor
from torch.nn import functional as F

from attnlab.ops.selective_scan import eager, log_step, selective_scan

TOKENS, CHANNELS, STATES, ROUNDS = 4096, 512, 16, 7


def draw(length: int) -> list[Tensor]:
    """x, dt, A, B, C, the first state."""
    x, B, C = (torch.randn(1, length, *size) for size in ((CHANNELS,), (1, STATES), (1, STATES)))
    rates = -torch.rand(CHANNELS, STATES) * STATES
    return [x, F.softplus(torch.randn_like(x) - 3), rates, B, C, torch.randn(1, CHANNELS, STATES)]


def whole(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """The public function with everything that is pointwise around the scan."""
    options = {"D": A[:, 0], "z": x, "delta_bias": A[:, 1], "delta_softplus": True}
    return selective_scan(x, dt, A, B, C, initial_state=state, **options)[0]


def main() -> None:
    """Check that both forms agree, then print medians of milliseconds, and of the ratios within a round."""
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in draw(TOKENS)]
    weights, softmax_weights = torch.randn(1, TOKENS, CHANNELS), torch.randn(1, HEADS, TOKENS, WIDTH)
    q, k, v = (torch.randn(1, HEADS, TOKENS, WIDTH, requires_grad=True) for _ in range(3))
    forms: dict[str, tuple[Callable[[], Tensor], list[Tensor], Tensor]] = {
        "sdpa": (lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], softmax_weights),
        "eager": (lambda: eager.scan(*inputs)[0], inputs, weights),
        "selective_scan": (lambda: whole(*inputs), inputs, weights),
        "log_step": (lambda: log_step.scan(*inputs)[0], inputs, weights),
    }
    found = []
    for name in ("eager", "log_step"):
        out = forms[name][0]()
        found.append((out.detach(), *torch.autograd.grad(out, inputs, weights)))
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
    if worst > 1e-4:
        raise AssertionError(f"eager and log_step differ by {worst:.1e}: a speed would mean nothing")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            times[name].append(seconds(*form))
    for name, own in times.items():
        print(f"{name:16}{describe(own, times['sdpa'], times['log_step'])}")
    print(f"eager against log_step: {worst:.0e}; one token: {one_token():.0f} us")


def describe(own: list[tuple[float, float]], *others: list[tuple[float, float]]) -> str:
    """Milliseconds forward and in all, and the share of SDPA's and of log_step's time."""
    parts = []
    for index, name in enumerate(("forward", "with backward")):
        ratios = [statistics.median(a[index] / b[index] for a, b in zip(own, other, strict=True)) for other in others]
        milliseconds = statistics.median(a[index] for a in own) * 1e3
        parts.append(f"{milliseconds:8.1f} ms {name}, {ratios[0]:.2f} of SDPA, {ratios[1]:.3f} of log_step")
    return "   ".join(parts)


def one_token() -> float:
    """Microseconds of a decoded token, the median of 500."""
    inputs, times = draw(1), []
    for _ in range(500):
        start = time.perf_counter()
        eager.scan(*inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


if __name__ == "__main__":
    main()
