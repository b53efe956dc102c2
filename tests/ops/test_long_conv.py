"""Long convolutions: the Fourier form against the sum, both directions, precision, refusals."""

from __future__ import annotations

import functools

import pytest
import torch

from attnlab.ops.long_conv import eager, long_conv
from ops.oracle import assert_equal_in_float64, assert_within_budget

SHAPES = [(1, 1, 1), (2, 3, 7), (1, 2, 64), (1, 2, 65), (2, 3, 4, 5), (1, 2, 1, 6), (1, 2, 3, 2, 4)]


def convolve(backend, x, kernel, skip, **options):
    return long_conv(x, kernel, skip, backend=backend, **options)


def draw(b, c, *grid):
    return torch.randn(b, c, *grid), torch.randn(c, *grid), torch.randn(c)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_the_sum_by_hand(backend):
    x, kernel, skip = (t.double() for t in draw(2, 2, 3, 4))
    y = long_conv(x, kernel, skip, backend=backend)
    for i in range(3):
        for j in range(4):
            expected = skip * x[:, :, i, j]
            expected = expected + sum(kernel[:, a, b] * x[:, :, i - a, j - b] for a in range(i + 1) for b in range(j + 1))
            torch.testing.assert_close(y[:, :, i, j], expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_sum(shape):
    assert_equal_in_float64(functools.partial(convolve, "eager"), functools.partial(convolve, "reference"), *draw(*shape))


@pytest.mark.parametrize("last", [1, 2, 9])
@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 3, 1, 9), (2, 3, 2, 9)], ids=str)
def test_the_last_places(shape, last):
    tensors = [t.double() for t in draw(*shape)]
    for backend in ("reference", "eager"):
        some, every = (long_conv(*tensors, last=wanted, backend=backend) for wanted in (last, None))
        torch.testing.assert_close(some, every[..., -last:])
    few = functools.partial(convolve, last=last)
    assert_equal_in_float64(functools.partial(few, "eager"), functools.partial(few, "reference"), *tensors)


def test_float32_is_as_precise_as_the_sum():
    tensors = draw(1, 2, 300)
    assert_within_budget(functools.partial(convolve, "eager"), functools.partial(convolve, "reference"), torch.float32, *tensors)


def test_half_precision_is_summed_in_wider():
    tensors = [t.bfloat16() for t in draw(1, 2, 40)]
    y, exact = long_conv(*tensors), long_conv(*(t.double() for t in tensors), backend="reference")
    assert y.dtype == torch.bfloat16
    assert float((y.double() - exact).abs().max()) <= torch.finfo(torch.bfloat16).eps * float(exact.abs().max())


@pytest.mark.parametrize("needed", [1, 2, 7, 11, 13, 97, 1000, 8191, 8193])
def test_lengths_that_transform_fast(needed):
    length = eager.fast_length(needed)
    rest = length
    for factor in (2, 3, 5):
        while rest % factor == 0:
            rest //= factor
    assert rest == 1 and needed <= length < max(1.3 * needed, needed + 2)


def test_refusals():
    x, kernel, skip = draw(2, 3, 5)
    with pytest.raises(ValueError, match="x, kernel"):
        long_conv(x, kernel[:, :4])
    with pytest.raises(ValueError, match="skip"):
        long_conv(x, kernel, skip[:2])
    with pytest.raises(ValueError, match="last"):
        long_conv(x, kernel, last=6)
    with pytest.raises(TypeError, match="kernel"):
        long_conv(x, kernel.long())
