"""Timing in interleaved pairs, and peak memory above the inputs in a process of its own."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor


def forward_and_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """A run of ``function`` with gradients for every floating input."""

    def run() -> None:
        leaves = [x.detach().requires_grad_() for x in inputs]
        function(*leaves).sum().backward()

    return run


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(ours: Callable[[], object], theirs: Callable[[], object], pairs: int = 9) -> float:
    """Median over interleaved pairs of the time of ``ours`` over that of ``theirs``."""
    for _ in range(2):
        ours(), theirs()
    return statistics.median(seconds(ours) / seconds(theirs) for _ in range(pairs))


def fastest(run: Callable[[], object], repeats: int = 5) -> float:
    """The least of several times: what the work takes when nothing disturbs it."""
    run()
    return min(seconds(run) for _ in range(repeats))


def peak_bytes(setup: str, work: str) -> int:
    """How much the resident set grows beyond ``setup`` while ``work`` runs, in a fresh process (Linux counts it)."""
    code = f"""
import pathlib, torch
torch.set_num_threads(2)
def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
{setup}
pathlib.Path("/proc/self/clear_refs").write_text("5")
base = status("VmRSS")
{work}
print(status("VmHWM") - base)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return int(out.stdout.split()[-1])


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The baseline."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
