"""The speed that the CPU paths promise, as ratios in one run: ``pytest -m speed`` on a quiet machine."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys

import pytest
import torch

from attnlab import create_mixer
from attnlab.ops.delta_rule import delta_rule
from attnlab.ops.linear_attention import linear_attention
from attnlab.ops.selective_scan import eager as eager_scan
from attnlab.ops.selective_scan import log_step, selective_scan
from attnlab.ops.sliding_window import sliding_window_attention
from speed.timing import causal_sdpa, fastest, forward_and_backward, peak_bytes, ratio, seconds

pytestmark = pytest.mark.speed
HEADS, WIDTH, INNER, STATE = 8, 32, 512, 16
DECAY = -torch.tensor([2.0**-h for h in range(1, HEADS + 1)])


def _lightning(q, k, v):
    return linear_attention(q, k, v, log_decay=DECAY)[0]


def _delta(q, k, v):
    beta = torch.full(q.shape[:3], 0.5)
    return delta_rule(q, k, v, beta)[0]


def _window(q, k, v):
    return sliding_window_attention(q, k, v, left=255)


def _heads(n: int) -> list[torch.Tensor]:
    q, k, v = (torch.randn(1, n, HEADS, WIDTH).transpose(1, 2) for _ in range(3))
    return [q, torch.nn.functional.normalize(k, dim=-1), v]


def _scan_inputs(n: int) -> list[torch.Tensor]:
    return [
        torch.randn(1, n, INNER),
        torch.rand(1, n, INNER) * 0.1,
        -torch.arange(1.0, STATE + 1).expand(INNER, -1).contiguous(),
        torch.randn(1, n, STATE),
        torch.randn(1, n, STATE),
    ]


def _scan(*inputs):
    return selective_scan(*inputs)[0]


OPS = {
    "lightning": (_lightning, _heads),
    "delta_net": (_delta, _heads),
    "sliding_window": (_window, _heads),
    "scan": (_scan, _scan_inputs),
}


@pytest.mark.parametrize(("name", "bar"), [("lightning", 0.15), ("delta_net", 0.45), ("sliding_window", 0.40)])
def test_share_of_sdpa_time(name, bar, record_property) -> None:
    function, make = OPS[name]
    inputs = make(4096)
    measured = ratio(forward_and_backward(function, *inputs), forward_and_backward(causal_sdpa, *_heads(4096)))
    record_property("ratio", measured)
    print(f"{name}: {measured:.3f} of SDPA")
    assert measured <= bar


def test_scan_against_the_log_step_scan(record_property) -> None:
    u, dt, a, b, c = _scan_inputs(4096)
    core = (u * dt, dt, a, b.unsqueeze(2), c.unsqueeze(2), torch.zeros(1, INNER, STATE))
    ours, theirs = (forward_and_backward(lambda *x, scan=scan: scan(*x)[0], *core) for scan in (eager_scan.scan, log_step.scan))
    measured = ratio(ours, theirs, pairs=5)
    record_property("ratio", measured)
    print(f"scan: {1 / measured:.2f} times as fast as the log-step scan")
    assert measured <= 1 / 2.5


@pytest.mark.parametrize("name", sorted(OPS))
def test_time_grows_linearly(name) -> None:
    function, make = OPS[name]
    times = {n: fastest(forward_and_backward(function, *make(n))) for n in (2048, 4096, 8192, 16384)}
    exponent = math.log(times[16384] / times[2048]) / math.log(8)
    print(f"{name}: n^{exponent:.2f}", {n: round(t * 1e3, 1) for n, t in times.items()})
    assert exponent <= 1.15


@pytest.mark.parametrize("name", sorted(OPS))
def test_memory_grows_linearly(name) -> None:
    def measure(n: int) -> int:
        setup = f"""
from speed.test_bars import OPS
from speed.timing import forward_and_backward
function, make = OPS[{name!r}]
forward_and_backward(function, *make(256))()
run = forward_and_backward(function, *make({n}))
"""
        return peak_bytes(f"import sys; sys.path.insert(0, 'tests')\n{setup}", "run()")

    sizes = {n: measure(n) for n in (4096, 8192, 16384)}
    exponent = math.log(sizes[16384] / sizes[4096]) / math.log(4)
    print(f"{name}: n^{exponent:.2f}", {n: f"{size / 2**20:.0f} MiB" for n, size in sizes.items()})
    assert exponent <= 1.15
    if name == "scan":
        assert sizes[16384] < 16384 * INNER * STATE * 4  # one n x inner x state tensor


@pytest.mark.parametrize("name", ["linear", "lightning", "delta_net", "mamba", "sliding_window"])
def test_a_token_costs_the_same_at_any_position(name) -> None:
    mixer = create_mixer(name, 256, 8, causal=True).eval()
    x = torch.randn(1, 1, 256)
    with torch.no_grad():
        state = mixer.init_state(1)
        _, state = mixer.extend(torch.randn(1, 1024, 256), state)
        early, early_bytes = statistics.median(seconds(lambda: mixer.extend(x, state)) for _ in range(200)), state.nbytes
        for _ in range(63):
            _, state = mixer.extend(torch.randn(1, 1024, 256), state)
        late = statistics.median(seconds(lambda: mixer.extend(x, state)) for _ in range(200))
    print(f"{name}: {early * 1e6:.0f} us at 1024, {late * 1e6:.0f} us at 65,536, {state.nbytes} bytes")
    assert state.nbytes == early_bytes
    assert late <= 1.2 * early


def test_import_costs_little_over_torch() -> None:
    def once(module: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True))

    once("attnlab")
    pairs = [(once("attnlab"), once("torch")) for _ in range(9)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"import attnlab {ours:.2f} s, import torch {theirs:.2f} s: {ours / theirs:.2f}")
    assert ours <= 1.2 * theirs
