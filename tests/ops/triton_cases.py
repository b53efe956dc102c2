"""Kernels written in Triton against the definition, in a process of their own where Triton must interpret them.

A case draws inputs, and returns for every result and gradient its error against the definition in float64, and the error
that is allowed: what the definition makes in the same dtype, and the unit in the last place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from ops.oracle import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPLIT = 2.0**-14  # what products of bfloat16 tiles with float32 ones lose, in two numbers of 8 bits, and sums of them


def interpret() -> None:
    """Make this process interpret kernels, before Triton is imported, and cut short sequences as a GPU would cut long ones."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from attnlab.ops import triton_launch

    triton_launch.SHORTEST = 64


def run_elsewhere() -> ProcessPoolExecutor:
    """A process in which Triton interprets: the switch acts where kernels and Triton's own library are defined."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=interpret)


def errors_and_budgets(op: Callable, inputs: dict[str, Tensor | None], dtype: torch.dtype, **options: Any) -> list[tuple]:
    """(error, allowed error) of each result and each gradient of ``op``; only the rows are in ``dtype``, states in float32."""
    rounded = {
        name: None if x is None else x.to(torch.float32 if name in WIDE else dtype).to(DEVICE) for name, x in inputs.items()
    }
    exact = _results(op, {name: None if x is None else x.double() for name, x in rounded.items()}, "reference", dtype, options)
    plain = _results(op, rounded, "reference", dtype, options)
    ours = _results(op, rounded, "triton", dtype, options)
    found = []
    for ours_i, plain_i, exact_i in zip(ours, plain, exact, strict=True):
        assert ours_i.dtype == plain_i.dtype and ours_i.shape == plain_i.shape
        found.append((relative_error(ours_i, exact_i), _budget(ours_i.dtype, dtype, relative_error(plain_i, exact_i))))
    return found


def _budget(result: torch.dtype, rows: torch.dtype, plain: float) -> float:
    """What a result's error may be where the definition's is ``plain``."""
    if rows == torch.float32:
        return 4 * plain + 4 * torch.finfo(torch.float32).eps
    if result == rows and DEVICE == "cpu":
        return torch.finfo(rows).eps + SPLIT  # the interpreter cuts bits off where a GPU rounds
    return 1.5 * plain + SPLIT


WIDE = {"log_decay", "initial_state", "bias"}


def _results(op: Callable, inputs: dict[str, Tensor | None], backend: str, dtype: torch.dtype, options: dict) -> list[Tensor]:
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in inputs.items()}
    results = op(**leaves, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in results]
    wanted = [x for x in leaves.values() if x is not None]
    return [x.detach() for x in (*results, *torch.autograd.grad(results, wanted, weights))]


def linear_attention(b: int, h: int, n: int, d: int, e: int, dtype: torch.dtype, decay: bool, state: bool) -> list[tuple]:
    """Causal, with rows as projections give them: views of (b, n, h, width)."""
    from attnlab.ops.linear_attention import linear_attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(b, n, h, width).transpose(1, 2) for width in (d, d, e))
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "log_decay": -torch.logspace(0, -3, h) if decay else None,
        "initial_state": torch.randn(b, h, d, e) if state else None,
    }
    return errors_and_budgets(linear_attention, inputs, dtype, scale=0.7)


def scan(b: int, n: int, e: int, s: int, weights: str, readers: str, state: bool) -> list[tuple]:
    """The whole op, in float32; B and C are "constant", "token", or a number of groups."""
    from attnlab.ops.selective_scan import selective_scan

    torch.manual_seed(0)

    def draw(kind: str) -> Tensor:
        shapes = {"constant": (e, s), "token": (b, n, s)}
        return torch.randn(shapes[kind] if kind in shapes else (b, n, int(kind), s))

    inputs = {
        "u": torch.randn(b, e, n).transpose(1, 2),
        "delta": torch.randn(b, n, 2 * e)[..., :e],
        "A": -torch.randn(e, s).exp(),
        "B": draw(weights),
        "C": draw(readers),
        "D": torch.randn(e),
        "initial_state": torch.randn(b, e, s) if state else None,
    }
    return errors_and_budgets(selective_scan, inputs, torch.float32, delta_softplus=True)


def no_decay_at_all_and_none_left(log_decay: float) -> float:
    """How far linear attention with decays of 1, or of 0, is from its closed form."""
    from attnlab.ops.linear_attention import linear_attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 4, device=DEVICE) for _ in range(3))
    o, _ = linear_attention(q, k, v, log_decay=torch.full((2,), log_decay, device=DEVICE), backend="triton")
    scores = (q @ k.mT).tril()
    scores = scores if log_decay == 0 else scores.tril() * torch.eye(70, device=DEVICE)
    return relative_error(o, scores @ v)


def pieces(splits: list[int]) -> float:
    """How far pieces of both ops, with the state handed on, are from one pass."""
    from attnlab.ops.linear_attention import linear_attention
    from attnlab.ops.selective_scan import selective_scan

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, sum(splits), 4, device=DEVICE) for _ in range(3))
    decay = torch.tensor([-0.5, -0.01], device=DEVICE)
    whole, state, found = linear_attention(q, k, v, log_decay=decay, backend="triton")[0], None, []
    for rows in zip(*(x.split(splits, 2) for x in (q, k, v)), strict=True):
        piece, state = linear_attention(*rows, log_decay=decay, initial_state=state, backend="triton")
        found.append(piece)
    error = relative_error(torch.cat(found, 2), whole)
    u, delta, B = q[:, 0], k[:, 0].abs(), v[:, 1]
    A, state, found = -torch.rand(4, 4, device=DEVICE), None, []
    whole = selective_scan(u, delta, A, B, B, backend="triton")[0]
    for rows in zip(*(x.split(splits, 1) for x in (u, delta, B)), strict=True):
        piece, state = selective_scan(rows[0], rows[1], A, rows[2], rows[2], initial_state=state, backend="triton")
        found.append(piece)
    return max(error, relative_error(torch.cat(found, 1), whole))


def registered() -> None:
    """PyTorch's own checks of the custom ops: schema, fake kernel, autograd, tracing with symbolic sizes."""
    from torch.library import opcheck

    from attnlab.ops.linear_attention import triton as linear
    from attnlab.ops.selective_scan import triton as scan

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 4, device=DEVICE, requires_grad=True) for _ in range(3))
    state = torch.randn(1, 2, 4, 4, device=DEVICE, requires_grad=True)
    opcheck(linear._forward, (q, k, v, -torch.rand(2, device=DEVICE), state, 1.0))
    opcheck(linear._forward, (q, k, v, None, None, 1.0))
    x, dt = (torch.rand(1, 20, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    weights = torch.randn(1, 20, 1, 3, device=DEVICE, requires_grad=True)
    opcheck(scan._forward, (x, dt, -torch.rand(4, 3, device=DEVICE), weights, weights, torch.zeros(1, 4, 3, device=DEVICE), True))


def compiled() -> float:
    """How far a compiled function of both ops, traced whole with symbolic sizes, is from the function."""
    from attnlab.ops.linear_attention import linear_attention
    from attnlab.ops.selective_scan import selective_scan

    def both(x: Tensor) -> Tensor:
        o, _ = linear_attention(x, x, x, backend="triton")
        return (
            o[:, 0]
            + selective_scan(x[:, 0], x[:, 0].abs(), -torch.ones_like(x[0, 0, :4].mT), x[:, 1], x[:, 1], backend="triton")[0]
        )

    traced = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.manual_seed(0)
    return max(relative_error(traced(x), both(x)) for x in (torch.randn(1, 2, n, 4, device=DEVICE) for n in (20, 33)))


def tiles(
    b: int, h: int, hk: int, n: int, m: int, d: int, e: int, t: int, x: int, y: int, dtype: torch.dtype, **what: Any
) -> list[tuple]:
    """Tiles of random places, some of them nobody's; both outputs, and -inf where there is no key read as 0.

    Args:
        b: examples.
        h: query heads.
        hk: key heads.
        n: queries.
        m: keys.
        d: width of a head.
        e: width of the values.
        t: tiles.
        x: queries of a tile.
        y: keys of a tile.
        dtype: of queries, keys and values.
        **what: kinds of tile (0 without a bias), own (an index for each head), masked, and options of the op.
    """
    from attnlab.ops.tile_attention import tile_attention

    torch.manual_seed(0)
    kinds, own, masked = what.pop("kinds", 0), what.pop("own", False), what.pop("masked", False)
    queries, keys = (torch.randint(-1, size, (b if own else 1, h if own else 1, t, count)) for size, count in ((n, x), (m, y)))
    queries[..., 0, :] = -1
    what["key_mask"] = (torch.rand(b, m) > 0.3).to(DEVICE) if masked else None
    what["kind"] = torch.randint(kinds, (t,)).to(DEVICE) if kinds else None
    inputs = {name: torch.randn(b, rows, heads, width).transpose(1, 2) for name, rows, heads, width in
              (("q", n, h, d), ("k", m, hk, d), ("v", m, hk, e))}  # fmt: skip
    inputs["bias"] = torch.randn(h, kinds, x, y) if kinds else None

    def op(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        places = (index.to(DEVICE) for index in (queries, keys))
        out, lse = tile_attention(q, k, v, *places, bias=bias, backend=backend, **what)
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    found = errors_and_budgets(op, inputs, dtype)
    # Backward takes the sums of a row's weighted gradients from the rounded output, so that no gradient is better than that.
    return found[:2] + [(error, max(budget, 2 * torch.finfo(dtype).eps)) for error, budget in found[2:]]
