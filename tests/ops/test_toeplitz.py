"""Toeplitz products: the Fourier form against the dense matrix, both directions, blocks of columns, precision, refusals."""

from __future__ import annotations

import functools

import pytest
import torch

from attnlab.ops.attention import Pairwise, attention
from attnlab.ops.toeplitz import eager, toeplitz_linear_attention, toeplitz_matmul
from ops.oracle import assert_equal_in_float64, assert_within_budget

# b, h, n, m, c
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 7, 7, 4),
    (1, 2, 1, 9, 3),
    (2, 1, 9, 1, 2),
    (1, 2, 5, 12, 3),
    (1, 2, 12, 5, 3),
    (1, 1, 64, 65, 2),
]


def product(backend, values, x, causal=False):
    return toeplitz_matmul(values, x, causal=causal, backend=backend)


def attend(backend, values, q, k, v, causal=False):
    return toeplitz_linear_attention(values, q, k, v, causal=causal, backend=backend)


def draw(b, h, n, m, c, features=5):
    return torch.randn(h, n + m - 1), torch.randn(b, h, n, features), torch.randn(b, h, m, features), torch.randn(b, h, m, c)


@pytest.mark.parametrize("causal", [False, True])
def test_the_dense_matrix_by_hand(causal):
    values, x = torch.randn(2, 8, dtype=torch.float64), torch.randn(1, 2, 5, 3, dtype=torch.float64)
    for backend in ("reference", "eager"):
        y = product(backend, values, x, causal)
        for h in range(2):
            for i in range(4):
                # the last of the four queries stands at the last of the five keys
                offsets = [j - (i + 1) for j in range(5)]
                expected = sum(values[h, r + 4] * x[0, h, j] for j, r in enumerate(offsets) if r <= 0 or not causal)
                torch.testing.assert_close(y[0, h, i], expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_equals_the_dense_one(shape, causal):
    values, _, _, x = draw(*shape)
    assert_equal_in_float64(
        functools.partial(product, "eager", causal=causal), functools.partial(product, "reference", causal=causal), values, x
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_attention_equals_all_pairs(shape, causal):
    assert_equal_in_float64(
        functools.partial(attend, "eager", causal=causal), functools.partial(attend, "reference", causal=causal), *draw(*shape)
    )


@pytest.mark.parametrize("size", [1, 300, 2**24])
def test_blocks_of_any_size(monkeypatch, size):
    monkeypatch.setattr(eager, "BLOCK", size)
    assert_equal_in_float64(functools.partial(attend, "eager"), functools.partial(attend, "reference"), *draw(2, 2, 9, 11, 3))


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_dense_attention_without_a_normaliser_and_with_a_factor(causal):
    values, q, k, v = (t.double() for t in draw(2, 3, 8, 8, 4))
    dense = attention(q, k, v, scale=1.0, factor=Pairwise(offsets=values), causal=causal, normalizer="identity")
    torch.testing.assert_close(attend("auto", values, q, k, v, causal), dense)


def test_one_table_for_all_heads():
    values, _, _, x = draw(2, 3, 6, 6, 4)
    torch.testing.assert_close(toeplitz_matmul(values[:1], x), toeplitz_matmul(values[:1].expand(3, -1), x))


@pytest.mark.parametrize("shape", [(2, 3, 60, 60, 4), (1, 2, 500, 500, 3)], ids=str)
def test_float32_is_as_precise_as_the_sum(shape):
    assert_within_budget(functools.partial(attend, "eager"), functools.partial(attend, "reference"), torch.float32, *draw(*shape))


def test_half_precision_is_summed_in_float32():
    values, q, k, v = (t.bfloat16() for t in draw(1, 2, 40, 40, 3))
    y = attend("eager", values, q, k, v)
    assert y.dtype == torch.bfloat16
    exact = attend("reference", *(t.double() for t in (values, q, k, v)))
    assert float((y.double() - exact).abs().max()) <= torch.finfo(torch.bfloat16).eps * float(exact.abs().max())


@pytest.mark.parametrize("needed", [1, 2, 15, 16, 17, 1000, 8191, 8193])
def test_the_circle_is_large_enough_and_not_twice_that(needed):
    assert needed <= eager.circle(needed) < max(2 * needed, 17)


def test_custom_ops_are_whole():
    tensors = [t.double().requires_grad_() for t in draw(2, 2, 5, 6, 3)]
    torch.library.opcheck(eager._forward, tuple(tensors))


@pytest.mark.parametrize(
    ("values", "shapes", "said"),
    [
        ((2, 8), [(1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 3)], "n \\+ m - 1 = 9"),
        ((3, 9), [(1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 3)], "2 or 1"),
        ((2, 9), [(1, 2, 5, 4), (1, 2, 5, 3), (1, 2, 5, 3)], "4 features"),
        ((2, 9), [(1, 2, 5, 4), (1, 2, 6, 4), (1, 2, 5, 3)], "q, k, v"),
    ],
)
def test_refusals(values, shapes, said):
    with pytest.raises(ValueError, match=said):
        toeplitz_linear_attention(torch.randn(values), *(torch.randn(shape) for shape in shapes))
    with pytest.raises(TypeError, match="values"):
        toeplitz_matmul(torch.ones(2, 9, dtype=torch.int64), torch.randn(1, 2, 5, 3))
