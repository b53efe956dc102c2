"""Aggregation over neighbourhoods: shifted views against the table of all windows, the adjoint, borders, precision, refusals."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attnlab.ops.aggregation import eager, neighborhood_aggregation, neighborhood_scatter
from attnlab.ops.aggregation.runs import windows_of
from ops.oracle import assert_equal_in_float64, assert_within_budget

CASES = [
    ((7,), {"window": 3}),
    ((11,), {"window": 4, "dilation": 2}),
    ((11,), {"window": 4, "dilation": 2, "border": "shifted"}),
    ((5, 6), {"window": (3, 5), "stride": (2, 3)}),
    ((5, 6), {"window": (3, 4), "border": "shifted"}),
    ((7, 6), {"window": (3, 2), "dilation": (2, 3), "border": "shifted"}),
    ((4, 3, 5), {"window": (3, 2, 3), "dilation": (1, 1, 2)}),
    ((4, 3, 5), {"window": (4, 2, 3), "border": "shifted"}),
    ((1, 9), {"window": (3, 3)}),
    ((2, 2), {"window": 7}),
]


def draw(grid, options, e=3, b=2, h=2):
    axes = windows_of(grid, **options)
    queries = math.prod(axis.queries for axis in axes)
    weights = torch.randn(b, h, queries, math.prod(axis.width for axis in axes))
    return weights, torch.randn(b, h, math.prod(grid), e), torch.randn(b, h, queries, e)


@pytest.mark.parametrize(("grid", "options"), CASES, ids=str)
def test_views_equal_the_table(grid, options):
    weights, v, u = draw(grid, options)
    for op, x in ((neighborhood_aggregation, v), (neighborhood_scatter, u)):
        given_rules = functools.partial(op, grid=grid, **options)
        assert_equal_in_float64(given_rules, functools.partial(given_rules, backend="reference"), weights, x)


@given(st.data())
def test_views_equal_the_table_for_any_sizes(data):
    rank = data.draw(st.integers(1, 3))
    grid = data.draw(st.tuples(*[st.integers(1, {1: 30, 2: 8, 3: 4}[rank])] * rank))
    dilation = tuple(data.draw(st.integers(1, min(3, n))) for n in grid)
    if data.draw(st.booleans()):
        window = tuple(data.draw(st.integers(1, n // t)) for n, t in zip(grid, dilation, strict=True))
        options = {"window": window, "dilation": dilation, "border": "shifted"}
    else:
        window, stride = (tuple(data.draw(st.integers(1, 5)) for _ in grid) for _ in range(2))
        options = {"window": window, "stride": stride, "dilation": dilation}
    weights, v, u = draw(grid, options, e=2, b=1, h=1)
    for op, x in ((neighborhood_aggregation, v), (neighborhood_scatter, u)):
        given_rules = functools.partial(op, grid=grid, **options)
        assert_equal_in_float64(given_rules, functools.partial(given_rules, backend="reference"), weights, x)


@pytest.mark.parametrize(("grid", "options"), CASES, ids=str)
def test_scatter_is_the_adjoint(grid, options):
    weights, v, u = (t.double() for t in draw(grid, options))
    gathered = neighborhood_aggregation(weights, v, grid=grid, **options)
    spread = neighborhood_scatter(weights, u, grid=grid, **options)
    torch.testing.assert_close((gathered * u).sum(), (spread * v).sum())


def test_alike_weights_are_a_depthwise_convolution():
    v, kernel = torch.randn(2, 3, 35, 4, dtype=torch.float64), torch.randn(3, 3, 5, dtype=torch.float64)
    weights = kernel.flatten(1)[None, :, None].expand(2, -1, 35, -1)
    images = v.transpose(2, 3).reshape(2, 12, 5, 7)
    kernels = kernel.repeat_interleave(4, 0).unsqueeze(1)
    for dilation in (1, 2):
        expected = F.conv2d(images, kernels, padding=(dilation, 2 * dilation), dilation=dilation, groups=12)
        found = neighborhood_aggregation(weights, v, grid=(5, 7), window=(3, 5), dilation=dilation)
        torch.testing.assert_close(found.transpose(2, 3).reshape(expected.shape), expected)


def test_weights_of_one_fold():
    u = torch.randn(1, 1, 12, 4, dtype=torch.float64)
    ones = torch.ones(1, 1, 12, 9, dtype=torch.float64)
    folded = neighborhood_scatter(ones, u, grid=(5, 7), window=3, stride=2)
    windows = u[0, 0].T.repeat_interleave(9, 0)
    expected = F.fold(windows[None], (5, 7), 3, padding=1, stride=2)
    torch.testing.assert_close(folded[0, 0].T.reshape(expected.shape[1:]), expected[0])


def test_a_shifted_window_of_the_whole_grid_is_a_matrix_product():
    weights, v = torch.randn(2, 2, 12, 12), torch.randn(2, 2, 12, 3)
    torch.testing.assert_close(neighborhood_aggregation(weights, v, grid=(3, 4), window=(3, 4), border="shifted"), weights @ v)


@pytest.mark.parametrize("border", ["zero", "shifted"])
def test_float32_is_as_precise_as_the_sum(border):
    options = {"window": 7, "border": border}
    weights, v, u = draw((12, 13), options)
    for op, x in ((neighborhood_aggregation, v), (neighborhood_scatter, u)):
        given_rules = functools.partial(op, grid=(12, 13), **options)
        assert_within_budget(given_rules, functools.partial(given_rules, backend="reference"), torch.float32, weights, x)


def test_half_precision_is_summed_in_float32():
    weights, v, _ = (t.bfloat16() for t in draw((9, 9), {"window": 7}))
    y = neighborhood_aggregation(weights, v, grid=(9, 9), window=7)
    assert y.dtype == torch.bfloat16
    exact = neighborhood_aggregation(weights.double(), v.double(), grid=(9, 9), window=7, backend="reference")
    assert float((y.double() - exact).abs().max()) <= torch.finfo(torch.bfloat16).eps * float(exact.abs().max())


@pytest.mark.parametrize("shifted", [False, True])
def test_custom_ops_are_whole(shifted):
    rules = ([4, 5], [3, 2], [1, 1], [1, 2], shifted)
    weights, v, u = (torch.randn(1, 2, 20, e, dtype=torch.float64, requires_grad=True) for e in (6, 3, 3))
    torch.library.opcheck(eager._gather, (weights, v, *rules))
    torch.library.opcheck(eager._spread, (weights, u, *rules))
    torch.library.opcheck(eager._products, (u, v, *rules))


def test_the_gradient_has_a_gradient():
    weights, v, _ = (t.double().requires_grad_() for t in draw((3, 4), {"window": 3}, b=1, h=1))
    torch.autograd.gradgradcheck(lambda w, x: neighborhood_aggregation(w, x, grid=(3, 4), window=3), (weights, v))


@pytest.mark.parametrize(
    ("shapes", "options", "said"),
    [
        (((1, 1, 12, 9), (1, 1, 11, 2)), {"window": 3}, "v: expected 12 tokens"),
        (((1, 1, 12, 8), (1, 1, 12, 2)), {"window": 3}, "weights: expected 12 queries of 9 places"),
        (((1, 2, 12, 9), (1, 1, 12, 2)), {"window": 3}, "weights, v: expected"),
        (((1, 1, 12, 9), (1, 1, 12, 2)), {"window": (3, 3, 3)}, "window: expected one positive number"),
        (((1, 1, 12, 9), (1, 1, 12, 2)), {"window": 3, "border": "cut"}, "border: expected one of"),
        (((1, 1, 12, 9), (1, 1, 12, 2)), {"window": 3, "border": "shifted", "stride": 2}, "stride: expected 1"),
        (((1, 1, 12, 9), (1, 1, 12, 2)), {"window": 4, "border": "shifted"}, "window: expected window"),
    ],
)
def test_refusals(shapes, options, said):
    with pytest.raises(ValueError, match=said):
        neighborhood_aggregation(*(torch.randn(shape) for shape in shapes), grid=(3, 4), **options)


def test_only_floating_weights():
    with pytest.raises(TypeError, match="weights"):
        neighborhood_aggregation(torch.ones(1, 1, 12, 9, dtype=torch.int64), torch.randn(1, 1, 12, 2), grid=(3, 4), window=3)
    with pytest.raises(ValueError, match="grid: expected one to three sides"):
        neighborhood_aggregation(torch.randn(1, 1, 16, 3), torch.randn(1, 1, 16, 2), grid=(2, 2, 2, 2), window=3)
