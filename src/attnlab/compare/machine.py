"""What machine this is, and how fast it is at the two things that everything else is made of."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import attnlab.core
from attnlab.compare.cells import code_version


def machine_facts(measure: bool = True) -> dict[str, Any]:
    """Facts for a report.

    Args:
        measure: time a matrix product and a copy too, which takes about half a second.
    """
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blas": "MKL" if torch.backends.mkl.is_available() else "other",
        "code": code_version(),
        "commit": git_commit(),
    }
    if measure:
        facts |= {"matmul_gflops": matmul_gflops(), "copy_gbytes": copy_gbytes()}
    return facts


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if found:
            return found
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int | None:
    """Bytes of memory in the machine, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def git_commit() -> str | None:
    """Short hash of the checkout that the package lies in, with "+" if it was changed; None for an installed package."""
    folder = Path(attnlab.core.__path__[0]).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if not git("ls-files", "core/__init__.py"):
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _best_seconds(function: Any, seconds: float = 0.15) -> float:
    function()
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_gflops(side: int = 512) -> float:
    """Float32 matrix products in 10^9 floating-point operations a second, the best of several."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    out = torch.empty(side, side)
    return 2.0 * side**3 / _best_seconds(lambda: torch.mm(a, b, out=out)) / 1e9


def copy_gbytes(megabytes: int = 64) -> float:
    """10^9 bytes a second that a copy reads and writes, both counted, the best of several."""
    source = torch.ones(megabytes * 2**18)
    target = torch.zeros_like(source)
    return 2.0 * megabytes * 2**20 / _best_seconds(lambda: target.copy_(source)) / 1e9
