"""What windows, neighbourhoods and chosen blocks promise on CPU, as ratios in one run: ``pytest -m speed``, all quiet."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from attnlab.core.masks import Masks
from attnlab.core.tilings import boxes
from attnlab.mixers.parts.selection import tokens_of_blocks
from attnlab.ops.sliding_window import sliding_window_attention
from attnlab.ops.tile_attention import tile_attention
from attnlab.ops.tile_attention.neighborhood import neighborhood_attention
from speed.timing import causal_sdpa, fastest, forward_and_backward, peak_bytes, ratio

pytestmark = pytest.mark.speed
HEADS, WIDTH = 8, 32


def heads(n: int) -> list[Tensor]:
    return [torch.randn(1, n, HEADS, WIDTH).transpose(1, 2) for _ in range(3)]


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sliding_window_attention(q, k, v, left=255)


def near(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], window: int) -> Tensor:
    return neighborhood_attention(q, k, v, grid=grid, window=window).output


def chosen(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    return tile_attention(q, k, v, queries, keys).output


def random_blocks(n: int, size: int, count: int, own: bool) -> tuple[Tensor, Tensor]:
    """Blocks of queries, each with ``count`` random blocks of keys, other ones for each head if ``own``."""
    blocks = n // size
    drawn = torch.rand(1, HEADS if own else 1, blocks, blocks).topk(count).indices
    return torch.arange(n).view(1, 1, blocks, size), tokens_of_blocks(drawn, size, n)


def regions(side: int, window: int, count: int) -> tuple[Tensor, Tensor]:
    """Square regions of a grid, each with the keys of ``count`` random regions (bi-level routing)."""
    cells = boxes((side, side), (window, window))
    picked = torch.rand(len(cells), len(cells)).topk(count).indices
    return cells[None, None], cells[picked].flatten(1)[None, None]


class Case(NamedTuple):
    """A function of queries, keys and values, tokens, keys that a query really uses, the bar, and the baseline."""

    function: Callable[..., Tensor]
    length: int
    keys: int
    bar: float
    baseline: Callable[..., Tensor] = F.scaled_dot_product_attention


def blocks_case(bar: float) -> Case:
    queries, keys = random_blocks(4096, 64, 8, own=True)
    return Case(partial(chosen, queries=queries, keys=keys), 4096, 512, bar)


def regions_case(bar: float) -> Case:
    queries, keys = regions(56, 8, 4)
    return Case(partial(chosen, queries=queries, keys=keys), 3136, 256, bar)


CASES = {
    "sliding window 256, 4096": lambda: Case(window, 4096, 256, 0.34, causal_sdpa),
    "sliding window 256, 16384": lambda: Case(window, 16384, 256, 0.09, causal_sdpa),
    "7x7 on 64x64": lambda: Case(partial(near, grid=(64, 64), window=7), 4096, 49, 0.20),
    "7x7 on 128x128": lambda: Case(partial(near, grid=(128, 128), window=7), 16384, 49, 0.06),
    "8 of 64 blocks of 64": lambda: blocks_case(0.50),
    "top 4 of 49 regions on 56x56": lambda: regions_case(0.60),
}


def multiply_rate() -> float:
    """Multiply-adds a second of a large matrix product, times 2."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    out = torch.empty(2048, 2048)
    return 2 * 2048**3 / fastest(lambda: torch.mm(a, b, out=out), 5)


@pytest.mark.parametrize("name", CASES)
def test_share_of_sdpa_time(name) -> None:
    function, length, keys, bar, baseline = CASES[name]()
    ours, theirs = forward_and_backward(function, *heads(length)), forward_and_backward(baseline, *heads(length))
    share = ratio(ours, theirs, pairs=5)
    useful = 7 * 2 * HEADS * length * keys * WIDTH  # two products forward, five backward
    print(f"{name}: {share:.3f} of SDPA, bar {bar}; {useful / fastest(ours) / multiply_rate():.2f} of the matrix-multiply rate")
    assert share <= bar


CROSSOVERS = [
    ("routing_kmeans", {}),
    ("routing_kmeans", {"causal": True}),
    ("hyper_attention", {}),
    ("hyper_attention", {"causal": True}),
    ("mixture_of_block", {"top_k": 4, "scope": "query"}),
    ("mixture_of_block", {"top_k": 4, "causal": True}),
]


@pytest.mark.parametrize(("name", "options"), CROSSOVERS, ids=str)
def test_it_beats_sdpa_from_some_length(name, options) -> None:
    mixer = create_mixer(name, HEADS * WIDTH, HEADS, **options)
    baseline = causal_sdpa if mixer.causal else F.scaled_dot_product_attention
    shares = {}
    for n in (1024, 2048, 4096, 8192):
        ours = forward_and_backward(lambda q, k, v, n=n: mixer.attend(q, k, v, Masks(), (n,)), *heads(n))
        shares[n] = ratio(ours, forward_and_backward(baseline, *heads(n)), pairs=3)
    said = ", ".join(f"{n}: {share:.2f}" for n, share in shares.items())
    print(f"{name} {options}: beats SDPA from {next((n for n, share in shares.items() if share < 1), 'nowhere')} ({said})")
    assert min(shares.values()) < 1 and shares[8192] < 1


SETUPS = {
    "7x7": "s = round(n ** (1 / 2)); f = lambda q, k, v: near(q, k, v, (s, s), 7)",
    "5x5x5": "s = round(n ** (1 / 3)); f = lambda q, k, v: near(q, k, v, (s, s, s), 5)",
    "8 blocks of 64": "a, b = random_blocks(n, 64, 8, True); f = lambda q, k, v: chosen(q, k, v, a, b)",
}


@pytest.mark.parametrize("name", SETUPS)
def test_memory_grows_linearly(name) -> None:
    sizes = {}
    for n in (4096, 13824, 32768) if name == "5x5x5" else (4096, 16384, 65536):
        setup = f"""
import sys; sys.path.insert(0, 'tests')
import torch
from speed.test_local_bars import heads, near, chosen, random_blocks
from speed.timing import forward_and_backward
n = {n}
{SETUPS[name]}
run = forward_and_backward(f, *heads(n))
"""
        sizes[n] = peak_bytes(setup, "run()")
    first, last = min(sizes), max(sizes)
    exponent = math.log(sizes[last] / sizes[first]) / math.log(last / first)
    print(f"{name}: n^{exponent:.2f}", {n: f"{size / 2**20:.0f} MiB" for n, size in sizes.items()})
    assert exponent <= 1.15
