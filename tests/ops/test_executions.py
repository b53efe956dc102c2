"""Ways to compute exact softmax attention: all give the same, each at its own cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab import UnknownNameError
from attnlab.ops.attention import attention
from attnlab.ops.executions import Counts, execute, executions
from attnlab.ops.partial_attention.schedule import Segment, fixed_split, makespan, no_split, occupancy, stream_k, tiles_of
from attnlab.ops.partial_attention.splits import split_attention

NAMES = executions.names()
THINGS = [pytest.param(name, marks=pytest.mark.tier("T2", f"execution:{name}")) for name in NAMES]


def _inputs(b: int, n: int, m: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    return torch.randn(b, 2, n, 5, dtype=dtype), torch.randn(b, 2, m, 5, dtype=dtype), torch.randn(b, 2, m, 3, dtype=dtype)


@pytest.mark.parametrize("name", THINGS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 130), (300, 300), (1, 700)])
def test_all_give_softmax_attention_and_its_gradients(name, n, m) -> None:
    run = executions.get(name).factory
    q, k, v = (x.requires_grad_() for x in _inputs(3, n, m))
    lengths = torch.tensor([m, max(m // 3, 1), 1])
    real = torch.arange(m) < lengths[:, None]
    for given_lengths, mask in ((None, None), (lengths, real)):
        ours, theirs = run(q, k, v, lengths=given_lengths), attention(q, k, v, key_mask=mask, backend="reference")
        rows = torch.ones(3, n, dtype=torch.bool) if mask is None or n != m else mask  # in self-attention padding asks nothing
        weights = torch.randn_like(theirs) * rows[:, None, :, None]
        torch.testing.assert_close(ours * rows[:, None, :, None], theirs * rows[:, None, :, None], rtol=1e-9, atol=1e-12)
        grads = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (ours, theirs)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_no_keys_give_zero(name) -> None:
    q, k, v = _inputs(2, 4, 6)
    out = executions.get(name).factory(q, k, v, lengths=torch.tensor([0, 6]))
    assert (out[0] == 0).all()
    torch.testing.assert_close(out[1], attention(q, k, v)[1])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "naive"])
def test_large_logits_overflow_nothing_but_the_naive_form(name) -> None:
    q, k, v = _inputs(1, 2, 300, torch.float32)
    out = executions.get(name).factory(200.0 * q, k, v)
    torch.testing.assert_close(out, attention(200.0 * q, k, v, backend="reference"), rtol=1e-4, atol=1e-5)
    assert not torch.isfinite(executions.get("naive").factory(200.0 * q, k, v)).all()


def test_passes_divisions_and_memory_of_the_cascades() -> None:
    q, k, v = _inputs(1, 4, 1024)
    rows, weights = 2 * 4, 2 * 4 * 1024
    counted = {name: Counts() for name in ("naive", "three_pass", "deferred_division", "two_pass", "one_pass")}
    for name, counts in counted.items():
        executions.get(name).factory(q, k, v, counts=counts)
        assert counts.exponentials == weights
    assert {name: counts.passes for name, counts in counted.items()} == {
        "naive": 2,
        "three_pass": 3,
        "deferred_division": 2,
        "two_pass": 2,
        "one_pass": 1,
    }
    for name, counts in counted.items():
        assert counts.divisions == (weights if name in ("naive", "three_pass") else rows * v.shape[3])
        assert counts.live == (rows * 128 if name == "one_pass" else weights)
    reads = [counted[name].reads for name in ("three_pass", "two_pass", "one_pass")]
    assert reads == sorted(reads, reverse=True)
    assert counted["one_pass"].reads == k.numel() + v.numel()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.booleans())
def test_any_cut_of_the_keys(sizes: list[int], ragged: bool) -> None:
    m = sum(sizes)
    if m == 0:
        return
    q, k, v = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 2, m, 5).double(), torch.randn(2, 2, m, 3).double()
    lengths = torch.tensor([m, m // 2]) if ragged else None
    whole = attention(q, k, v, key_mask=None if lengths is None else torch.arange(m) < lengths[:, None])
    torch.testing.assert_close(split_attention(q, k, v, sizes, lengths=lengths).output, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parts", [2, 7, 64, 1000])
def test_one_query_over_65536_keys_in_splits_is_one_piece_to_float32_rounding(parts) -> None:
    q, k, v = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 65536, 32), torch.randn(1, 2, 65536, 32)
    exact = attention(q.double(), k.double(), v.double(), backend="reference")
    cuts = torch.randperm(65535)[: parts - 1].add(1).sort().values.tolist()
    sizes = [after - before for before, after in zip([0, *cuts], [*cuts, 65536], strict=True)]
    whole, split = (split_attention(q, k, v, pieces).output.double() for pieces in ([65536], sizes))
    scale = exact.abs().max()
    assert float((split - exact).abs().max() / scale) <= 4 * max(float((whole - exact).abs().max() / scale), 1.2e-7)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 9))
def test_stream_k_deals_evenly_and_leaves_nothing_out(tiles: list[int], workers: int) -> None:
    plan = stream_k(tiles, workers)
    loads = [sum(piece.stop - piece.start for piece in pieces) for pieces in plan]
    assert max(loads) - min(loads) <= 1
    for whole in (plan, no_split(tiles, workers), fixed_split(tiles, workers, 3)):
        covered = sorted((piece.output, tile) for pieces in whole for piece in pieces for tile in range(piece.start, piece.stop))
        assert covered == [(output, tile) for output, count in enumerate(tiles) for tile in range(count)]
        assert makespan(plan) <= makespan(whole)


def test_occupancy_on_a_ragged_batch() -> None:
    tiles = tiles_of([65536, 1000, 100, 1], 256)
    assert tiles == [256, 4, 1, 1]
    assert stream_k([3, 1], 2) == [[Segment(0, 0, 2)], [Segment(0, 2, 3), Segment(1, 0, 1)]]
    assert occupancy(stream_k(tiles, 8)) > 0.99
    assert occupancy(no_split(tiles, 8)) < 0.13
    assert occupancy(no_split(tiles, 8)) < occupancy(fixed_split(tiles, 8, 8)) <= occupancy(stream_k(tiles, 8))


def test_by_name() -> None:
    q, k, v = _inputs(1, 2, 6)
    torch.testing.assert_close(execute("split_keys", q, k, v, parts=2), attention(q, k, v))
    with pytest.raises(UnknownNameError, match="did you mean 'stream_k'"):
        execute("streamk", q, k, v)
    with pytest.raises(UnknownNameError, match="no option 'tiles'"):
        execute("stream_k", q, k, v, tiles=3)


def test_bad_input() -> None:
    q, k, v = _inputs(1, 2, 6)
    with pytest.raises(ValueError, match="add up to the 6 keys"):
        split_attention(q, k, v, [3, 2])
    with pytest.raises(ValueError, match="workers: expected at least 1"):
        stream_k([1], 0)
    with pytest.raises(ValueError, match="tile: expected at least 1"):
        tiles_of([1], 0)
    with pytest.raises(ValueError, match="parts: expected at least 1"):
        fixed_split([1], 1, 0)
