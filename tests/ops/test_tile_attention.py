"""Attention inside tiles: runs of tiles against the formula, every argument, both outputs, precision, memory, refusals."""

from __future__ import annotations

import functools

import pytest
import torch

from attnlab.ops.attention import attention
from attnlab.ops.partial_attention import merge
from attnlab.ops.tile_attention import from_tiles, places_of, tile_attention, work
from attnlab.ops.tile_attention.frame import forward
from ops.oracle import assert_equal_in_float64, assert_within_budget

# b, h, hk, n, m, d, e, tiles, queries, keys, own index a head
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, False),
    (2, 4, 2, 23, 17, 3, 5, 6, 4, 7, False),
    (2, 2, 2, 9, 31, 4, 4, 5, 3, 8, True),
    (1, 6, 1, 40, 40, 2, 3, 11, 5, 5, True),
]
OPTIONS = [
    {},
    {"ragged": True},
    {"ragged": True, "outside": "zero"},
    {"causal": True, "ragged": True},
    {"masked": True},
    {"masked": True, "outside": "zero", "ragged": True},
    {"kinds": 3},
    {"kinds": 1, "one_head": True, "causal": True},
]


def draw(b, h, hk, n, m, d, e):
    return torch.randn(b, h, n, d), torch.randn(b, hk, m, d), torch.randn(b, hk, m, e)


def places(own, b, h, tiles, size, length, ragged):
    index = torch.randint(length, (b if own else 1, h if own else 1, tiles, size))
    if ragged:
        index[torch.rand(index.shape) < 0.4] = -1
        index[..., 0, :] = -1
    return index


def case(shape, ragged=False, masked=False, kinds=0, one_head=False, **options):
    """The eager and the reference form as functions of q, k, v and, where there is one, the bias; and these."""
    b, h, hk, n, m, d, e, tiles, x, y, own = shape
    queries, keys = places(own, b, h, tiles, x, n, ragged), places(own, b, h, tiles, y, m, ragged)
    if masked:
        options["key_mask"] = torch.rand(b, m) > 0.4
    kind = torch.randint(kinds, (tiles,)) if kinds else None
    inputs = draw(b, h, hk, n, m, d, e)
    if kinds:
        inputs = (*inputs, torch.randn(1 if one_head else h, kinds, x, y))

    def form(backend, q, k, v, bias=None):
        out, lse = tile_attention(q, k, v, queries, keys, bias=bias, kind=kind, backend=backend, **options)
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    return functools.partial(form, "eager"), functools.partial(form, "reference"), inputs


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_runs_equal_the_formula(shape, options):
    fast, slow, inputs = case(shape, **options)
    for output in range(2):
        assert_equal_in_float64(lambda *x, i=output: fast(*x)[i], lambda *x, i=output: slow(*x)[i], *inputs)


@pytest.mark.parametrize("size", [1, 50])
def test_runs_of_any_size(monkeypatch, size):
    monkeypatch.setattr(work, "CHUNK", {"cpu": size})
    fast, slow, inputs = case(SHAPES[2], kinds=2, ragged=True)
    assert_equal_in_float64(lambda *x: fast(*x)[0], lambda *x: slow(*x)[0], *inputs)


def test_nan_behind_the_mask_has_no_influence():
    q, k, v = (x.double() for x in draw(1, 2, 2, 6, 6, 3, 3))
    index = torch.arange(6).view(1, 1, 2, 3)
    mask = torch.tensor([[True, False, True, False, False, False]])
    nan = torch.where(mask, 0.0, torch.nan)[:, None, :, None]
    clean = tile_attention(q, k, v, index, index, key_mask=mask)
    dirty = tile_attention(q, k + nan, v + nan, index, index, key_mask=mask)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert clean.output[:, :, 1].eq(0).all() and clean.lse[:, :, 1].eq(float("-inf")).all()


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_that_hold_everything_are_dense_attention(causal):
    q, k, v = (x.double() for x in draw(2, 4, 2, 12, 12, 3, 5))
    order = torch.randperm(12)
    index = order.view(1, 1, 3, 4)
    out = tile_attention(q, k, v, index, torch.randperm(12).expand(1, 1, 3, -1), causal=causal).output
    torch.testing.assert_close(from_tiles(out, places_of(order.view(3, 4), 12)), attention(q, k, v, causal=causal))


def test_parts_of_the_keys_merge_to_attention_over_all():
    q, k, v = (x.double().requires_grad_() for x in draw(1, 2, 2, 8, 8, 3, 4))
    queries = torch.arange(8).view(1, 1, 2, 4)
    first, second = (torch.arange(8).view(2, 4)[i].expand(1, 1, 2, -1) for i in range(2))
    both = merge(tile_attention(q, k, v, queries, first), tile_attention(q, k, v, queries, second)).output.flatten(2, 3)
    dense = attention(q, k, v)
    torch.testing.assert_close(both, dense)
    grad = torch.randn_like(dense)
    for got, expected in zip(
        torch.autograd.grad(both, (q, k, v), grad), torch.autograd.grad(dense, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    fast, slow, inputs = case((2, 2, 2, 60, 60, 16, 16, 12, 5, 30, False), kinds=2)
    assert_within_budget(lambda *x: fast(*x)[0], lambda *x: slow(*x)[0], dtype, *inputs)


def test_the_custom_op_is_whole():
    q, k, v = (x.requires_grad_() for x in draw(1, 2, 1, 6, 6, 3, 4))
    index = torch.tensor([[0, 1, 2], [3, 4, -1]]).view(1, 1, 2, 3)
    bias = torch.randn(2, 1, 3, 3, requires_grad=True)
    kind = torch.zeros(2, dtype=torch.int64)
    torch.library.opcheck(
        forward, (q, k, v, index, index, bias, kind, True, torch.ones(1, 6, dtype=torch.bool), False, 0.5, "eager")
    )
    torch.library.opcheck(forward, (q, k, v, index, index, None, None, False, None, True, 0.5, "eager"))


def test_a_token_that_stands_nowhere_cannot_be_read():
    assert places_of(torch.tensor([[3, 1], [-1, 0]]), 4).tolist() == [3, 1, -1, 0]
    with pytest.raises((IndexError, RuntimeError)):
        from_tiles(torch.randn(1, 1, 2, 2, 3), places_of(torch.tensor([[3, 1], [-1, 0]]), 4))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"q": torch.randn(2, 3, 4)}, ValueError, "q: expected 4 axes"),
        ({"k": torch.randn(1, 3, 6, 4)}, ValueError, "v: expected batch, heads and tokens"),
        ({"queries": torch.zeros(1, 1, 2, 3)}, TypeError, "queries: expected int64"),
        ({"keys": torch.zeros(1, 1, 5, 3, dtype=torch.int64)}, ValueError, "keys: expected the 2 tiles"),
        ({"bias": torch.zeros(1, 1, 2, 2)}, ValueError, "bias: expected"),
        ({"kind": torch.zeros(2, dtype=torch.int64)}, ValueError, "kind: expected"),
        ({"key_mask": torch.zeros(1, 6)}, TypeError, "key_mask: expected bool"),
        ({"key_mask": torch.zeros(1, 5, dtype=torch.bool)}, ValueError, "key_mask: expected shape"),
        ({"outside": "nothing"}, ValueError, "outside: expected one of"),
    ],
)
def test_bad_input(change, error, says):
    index = torch.arange(6).view(1, 1, 2, 3)
    q, k, v = draw(1, 2, 2, 6, 6, 4, 4)
    with pytest.raises(error, match=says):
        tile_attention(**{"q": q, "k": k, "v": v, "queries": index, "keys": index, **change})
