"""Times recurrent operators on a GPU, each checked against the eager backend in the same run; prints a table and JSON.

    python scripts/gpu/time_recurrences.py --out timings.json

For every operator, length and width, forward and with backward: milliseconds of the Triton and the eager backend as called from
Python, of the GPU's work alone, the share of it that copying the fewest possible bytes would take, and the same of PyTorch's
causal attention in bfloat16 at these sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlab.ops.delta_rule import DELTA_RULE, delta_rule
from attnlab.ops.linear_attention import linear_attention
from attnlab.ops.selective_scan import selective_scan

HEAD, STATES, EXPANSION = 64, 16, 2
DEVICE = "cuda"


def milliseconds(run: Callable[[], object], seconds: float = 0.1) -> float:
    """The median of repeated runs, timed by the GPU's own clock, after a warm-up."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = max(3, min(50, int(seconds / max(1e-6, time.perf_counter() - begin))))
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, stop in marks:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(stop) for start, stop in marks)


def replayed(run: Callable[[], object]) -> float:
    """Milliseconds of the work of ``run`` on the GPU alone: recorded once, and replayed without Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(graph.replay)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.randn(2**30, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3


def heads(n: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows (1, heads, n, HEAD) as a projection gives them."""
    return torch.randn(1, n, dim // HEAD, HEAD, device=DEVICE, dtype=dtype).transpose(1, 2).requires_grad_()


def linear(n: int, dim: int, dtype: torch.dtype) -> tuple[Callable[[str], Tensor], list[Tensor], float, float]:
    """Linear attention with a decay a head: a call by backend, its leaves, and the fewest bytes forward and with backward."""
    q, k, v = (heads(n, dim, dtype) for _ in range(3))
    decay = -torch.logspace(0, -3, dim // HEAD, device=DEVICE)
    row = n * dim * q.element_size()
    return lambda backend: linear_attention(q, k, v, log_decay=decay, backend=backend)[0], [q, k, v], 4.0 * row, 11.0 * row


def delta(n: int, dim: int, dtype: torch.dtype) -> tuple[Callable[[str], Tensor], list[Tensor], float, float]:
    """The delta rule, likewise."""
    q, k, v = (heads(n, dim, dtype) for _ in range(3))
    beta = torch.rand(1, dim // HEAD, n, device=DEVICE, dtype=dtype)
    row = n * dim * q.element_size()
    return lambda backend: delta_rule(q, F.normalize(k, dim=-1), v, beta, backend=backend)[0], [q, k, v], 4.0 * row, 11.0 * row


def scan(n: int, dim: int, dtype: torch.dtype) -> tuple[Callable[[str], Tensor], list[Tensor], float, float]:
    """The selective scan of a Mamba of that width, without its pointwise parts, in float32."""
    channels = EXPANSION * dim
    u = torch.randn(1, n, channels, device=DEVICE, requires_grad=True)
    delta = (0.1 * torch.rand(1, n, channels, device=DEVICE)).requires_grad_()
    B, C = (torch.randn(1, n, STATES, device=DEVICE, requires_grad=True) for _ in range(2))
    A = (-torch.arange(1, STATES + 1, device=DEVICE).float().expand(channels, STATES).contiguous()).requires_grad_()
    row = n * channels * 4
    return lambda backend: selective_scan(u, delta, A, B, C, backend=backend)[0], [u, delta, A, B, C], 3.0 * row, 8.0 * row


OPERATORS = {"linear": linear, "delta": delta, "scan": scan}


def both(call: Callable[[], Tensor], leaves: list[Tensor], weight: Tensor) -> list[Tensor]:
    """The output and the gradients."""
    out = call()
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest relative error of a result, in the Frobenius norm."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def timings(run: Callable[[], Tensor], leaves: list[Tensor], weight: Tensor, *, graph: bool = True) -> dict[str, float]:
    """Milliseconds forward and with backward, called from Python, and if ``graph`` also of the GPU's work alone."""

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    def whole() -> list[Tensor]:
        return both(run, leaves, weight)

    found = {"forward_ms": milliseconds(forward), "both_ms": milliseconds(whole)}
    return found | ({"forward_gpu_ms": replayed(forward), "both_gpu_ms": replayed(whole)} if graph else {})


def one(name: str, n: int, dim: int, dtype: torch.dtype, bandwidth: float) -> dict[str, object]:
    """A row of the table; no times where the backends differ."""
    torch.manual_seed(0)
    call, leaves, least, least_both = OPERATORS[name](n, dim, dtype)
    weight = torch.randn_like(call("triton"))
    ours = both(lambda: call("triton"), leaves, weight)
    begin = time.perf_counter()
    theirs = both(lambda: call("eager"), leaves, weight)
    torch.cuda.synchronize()
    once = (time.perf_counter() - begin) * 1e3
    found = difference(ours, theirs)
    agrees = found < (1e-2 if dtype == torch.bfloat16 else 1e-4)
    row: dict[str, object] = {"op": name, "n": n, "dim": dim, "dtype": str(dtype).removeprefix("torch."), "agrees": agrees}
    row["difference"] = found
    if not agrees:
        return row
    times = timings(lambda: call("triton"), leaves, weight)
    row |= times
    if once < 500:
        eager = timings(lambda: call("eager"), leaves, weight, graph=False)
        row |= {f"eager_{key}": value for key, value in eager.items()}
    else:  # a loop over tokens in Python: once is enough
        row["eager_both_ms"] = once
    for part, fewest in (("forward", least), ("both", least_both)):
        row[f"{part}_share"] = fewest / bandwidth / times[f"{part}_gpu_ms"] * 1e3
        row[f"{part}_tokens_per_s"] = n / times[f"{part}_ms"] * 1e3
    return row


def attention(n: int, dim: int) -> dict[str, object]:
    """PyTorch's causal attention in bfloat16."""
    q, k, v = (heads(n, dim, torch.bfloat16) for _ in range(3))
    weight = torch.randn_like(q)

    def call() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return {"op": "sdpa", "n": n, "dim": dim, "dtype": "bfloat16"} | timings(call, [q, k, v], weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 65536])
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--ops", nargs="+", default=list(OPERATORS), choices=list(OPERATORS))
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_per_s": bandwidth}
    print(json.dumps(facts), flush=True)
    rows: list[dict[str, object]] = []
    ops = [name for name in options.ops if name != "delta" or "triton" in DELTA_RULE.implementations]
    for dim in options.dims:
        for n in options.lengths:
            rows.append(attention(n, dim))
            for name in ops:
                for dtype in (torch.float32,) if name == "scan" else (torch.bfloat16, torch.float32):
                    rows.append(one(name, n, dim, dtype, bandwidth))
            for row in rows[-(2 * len(ops) + 1) :]:
                text = " ".join(f"{key}={value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items())
                print(text, flush=True)
            if options.out:
                options.out.write_text(json.dumps(facts | {"rows": rows}, indent=1))
    if not all(row.get("agrees", True) for row in rows):
        sys.exit("some configurations differ from the eager backend")


if __name__ == "__main__":
    main()
