"""Time our operators against public PyTorch implementations of the same functions, on this machine, in interleaved pairs.

The peers are no dependencies; install them into an environment of their own and run there:

    pip install flash-linear-attention triton mambapy -e .
    python scripts/bench/peers.py [--tokens 4096] [--json peers.json]

Only answers that agree to float32 rounding are timed. A peer that is missing is named and left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.ops.delta_rule import delta_rule
from attnlab.ops.gated_linear_attention import gated_linear_attention
from attnlab.ops.linear_attention import linear_attention
from attnlab.ops.selective_scan import selective_scan

HEADS, WIDTH, INNER, STATES = 8, 32, 512, 16


@dataclass(frozen=True)
class Pair:
    """One function in two implementations, on the same inputs."""

    name: str
    peer: str
    inputs: list[Tensor]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]


@dataclass(frozen=True)
class Measured:
    """Seconds forward and backward, medians, and how far the answers are apart."""

    name: str
    peer: str
    tokens: int
    ours: float
    theirs: float
    error: float

    def __str__(self) -> str:
        return (
            f"{self.name:32s} {self.ours * 1e3:8.1f} ms   {self.peer}: {self.theirs * 1e3:8.1f} ms, "
            f"{self.theirs / self.ours:.1f} times ours; answers within {self.error:.1e}"
        )


def by_token(x: Tensor) -> Tensor:
    """(b, h, n, ...) as (b, n, h, ...), and back."""
    return x.transpose(1, 2)


def fla_pairs(n: int) -> list[Pair]:
    """The plain PyTorch paths of flash-linear-attention."""
    from fla.ops.delta_rule.naive import delta_rule_chunkwise
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.linear_attn.naive import naive_chunk_linear_attn
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    def first(x: Tensor | tuple[Tensor, ...]) -> Tensor:
        return x[0] if isinstance(x, tuple) else x

    q, k, v = (torch.randn(1, HEADS, n, WIDTH) for _ in range(3))
    k = F.normalize(k, dim=-1)
    decay, channels = (F.logsigmoid(torch.randn(1, HEADS, n, width)) / 16 for width in (1, WIDTH))
    beta, scale = torch.rand(1, HEADS, n), WIDTH**-0.5
    gate = decay.squeeze(-1)
    return [
        Pair(
            "linear attention",
            "fla naive_chunk",
            [q, k, v],
            lambda q, k, v: linear_attention(q, k, v)[0],
            lambda q, k, v: by_token(first(naive_chunk_linear_attn(*map(by_token, (q, k, v)), scale=1.0))),
        ),
        Pair(
            "with a decay a head and token",
            "fla naive_chunk_simple_gla",
            [q, k, v, gate],
            lambda q, k, v, g: gated_linear_attention(q, k, v, g.unsqueeze(-1), scale=scale)[0],
            lambda q, k, v, g: by_token(first(naive_chunk_simple_gla(*map(by_token, (q, k, v, g))))),
        ),
        Pair(
            "with a decay a channel and token",
            "fla naive_recurrent_gla",
            [q, k, v, channels],
            lambda q, k, v, g: gated_linear_attention(q, k, v, g, scale=scale)[0],
            lambda q, k, v, g: by_token(first(naive_recurrent_gla(*map(by_token, (q, k, v, g))))),
        ),
        Pair(
            "delta rule",
            "fla delta_rule_chunkwise",
            [q, k, v, beta],
            lambda q, k, v, b: delta_rule(q, k, v, b)[0],
            lambda q, k, v, b: first(delta_rule_chunkwise(q, k, v, b)),
        ),
        Pair(
            "gated delta rule",
            "fla naive_chunk_gated_delta_rule",
            [q, k, v, beta, gate],
            lambda q, k, v, b, g: delta_rule(q, k, v, b, log_decay=g)[0],
            lambda q, k, v, b, g: by_token(first(naive_chunk_gated_delta_rule(*map(by_token, (q, k, v, g, b))))),
        ),
    ]


def mambapy_pairs(n: int) -> list[Pair]:
    """The parallel scan of mambapy, with the tensors that it needs made inside, as its block does."""
    from mambapy.pscan import pscan

    A = -torch.arange(1.0, STATES + 1).expand(INNER, -1).contiguous()

    def theirs(u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        decay = torch.exp(dt.unsqueeze(-1) * A)
        states = pscan(decay, (dt * u).unsqueeze(-1) * B.unsqueeze(2))
        return (states @ C.unsqueeze(-1)).squeeze(3)

    inputs = [torch.randn(1, n, INNER), torch.rand(1, n, INNER) * 0.1, torch.randn(1, n, STATES), torch.randn(1, n, STATES)]
    return [Pair("selective scan", "mambapy pscan", inputs, lambda u, dt, B, C: selective_scan(u, dt, A, B, C)[0], theirs)]


def run(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    """Forward and backward; the output."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.sum().backward()
    return out.detach()


def measure(pair: Pair, tokens: int, repeats: int) -> Measured:
    """Check that both agree, then time them in turn."""
    ours, theirs = run(pair.ours, pair.inputs), run(pair.theirs, pair.inputs)
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if error > 1e-3:
        raise SystemExit(f"{pair.name}: {pair.peer} is another function than ours, the answers differ by {error:.1e}")
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(repeats):
        for name, function in (("ours", pair.ours), ("theirs", pair.theirs)):
            start = time.perf_counter()
            run(function, pair.inputs)
            times[name].append(time.perf_counter() - start)
    return Measured(pair.name, pair.peer, tokens, *(statistics.median(times[name]) for name in ("ours", "theirs")), error)


def main() -> None:
    """Print a line a pair; write them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for source in (fla_pairs, mambapy_pairs):
        try:
            pairs = source(arguments.tokens)
        except ImportError as error:
            print(f"{source.__doc__} Not installed: {error}")
            continue
        for pair in pairs:
            results.append(measure(pair, arguments.tokens, arguments.repeats))
            print(results[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
