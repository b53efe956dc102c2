"""The short convolution: both eager forms against the sum over taps, streaming, precision, refusals."""

from __future__ import annotations

import functools

import pytest
import torch

from attnlab.core.errors import BackendUnavailableError
from attnlab.ops.short_conv import eager, short_conv
from ops.oracle import assert_equal_in_float64, assert_within_budget, relative_error, values_and_gradients

# b, n, c, w
SHAPES = [(1, 1, 1, 1), (2, 1, 5, 4), (2, 3, 3, 5), (3, 37, 1, 4), (1, 97, 6, 2), (2, 130, 17, 4), (2, 40, 3, 9)]


def draw(b, n, c, w):
    """x, weight, bias, state."""
    return torch.randn(b, n, c), torch.randn(c, w), torch.randn(c), torch.randn(b, w - 1, c)


def form(backend, x, weight, bias=None, state=None):
    return short_conv(x, weight, bias, state=state, backend=backend)


FAST, SLOW = functools.partial(form, "eager"), functools.partial(form, "reference")


@pytest.mark.parametrize("count", [2, 3, 4], ids=["plain", "bias", "bias and state"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_sum_over_taps(shape, count):
    assert_equal_in_float64(FAST, SLOW, *draw(*shape)[:count])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_as_precise_as_the_sum(shape):
    assert_within_budget(FAST, SLOW, torch.float32, *draw(*shape))


def test_float32_without_onednn(monkeypatch):
    tensors = draw(2, 70, 6, 4)
    expected = values_and_gradients(FAST, *tensors)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for got, wanted in zip(values_and_gradients(FAST, *tensors), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("size", [1, 30, 2**24])
def test_blocks_of_any_size(monkeypatch, size):
    monkeypatch.setattr(eager, "BLOCK", {"cpu": size})
    assert_equal_in_float64(FAST, SLOW, *draw(2, 23, 5, 4))


def test_the_last_tap_is_the_current_token():
    x, weight = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[10.0, 1.0]])
    y, state = short_conv(x, weight, torch.tensor([0.5]), state=torch.tensor([[[4.0]]]))
    assert y.flatten().tolist() == [41.5, 12.5, 23.5]
    assert state.flatten().tolist() == [3.0]


@pytest.mark.parametrize("pieces", [(1,) * 23, (2, 20, 1), (11, 12)])
def test_streaming_by_pieces_equals_one_pass(pieces):
    x, weight, bias, state = (t.double() for t in draw(2, 23, 5, 4))
    whole, last = short_conv(x, weight, bias, state=state)
    outputs = []
    for piece in x.split(pieces, 1):
        y, state = short_conv(piece, weight, bias, state=state)
        outputs.append(y)
    assert relative_error(torch.cat(outputs, 1), whole) < 1e-12
    assert torch.equal(state, last)


def test_the_state_keeps_no_more_than_itself():
    _, state = short_conv(*draw(2, 50, 5, 4)[:2])
    assert state.shape == (2, 3, 5)
    assert state.untyped_storage().nbytes() == state.numel() * 4


def test_inputs_that_are_views():
    wide, weight = torch.randn(2, 40, 12).double(), torch.randn(6, 4).double()
    assert_equal_in_float64(lambda x: FAST(x[..., ::2], weight), lambda x: SLOW(x[..., ::2], weight), wide)
    assert_equal_in_float64(lambda x: FAST(x.mT[:, :, :6], weight), lambda x: SLOW(x.mT[:, :, :6], weight), wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    narrow = [t.to(dtype) for t in draw(2, 40, 6, 4)]
    (y, state), (wide, _) = FAST(*narrow), FAST(*(t.float() for t in narrow))
    assert (y.dtype, state.dtype) == (dtype, dtype)
    assert torch.equal(y, wide.to(dtype))


@pytest.mark.parametrize("n", [1, 40])
def test_autocast_changes_nothing(n):
    tensors = [t.requires_grad_() for t in draw(2, n, 6, 4)]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, state = FAST(*tensors)
            found.append((y, state, *torch.autograd.grad(y.sum() + state.sum(), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_mixed_dtypes_meet_in_the_widest():
    x, weight, bias, state = draw(2, 9, 6, 4)
    y, new_state = short_conv(x.bfloat16(), weight, bias, state=state.bfloat16())
    assert (y.dtype, new_state.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": torch.randn(5, 6)}, ValueError, "x: expected \\(b, n, c\\)"),
        ({"x": torch.randn(2, 0, 6)}, ValueError, "n >= 1"),
        ({"x": torch.ones(2, 5, 6, dtype=torch.int64)}, TypeError, "x: expected a floating"),
        ({"weight": torch.randn(5, 4)}, ValueError, "weight: expected \\(6, w\\)"),
        ({"weight": torch.randn(6, 0)}, ValueError, "w >= 1"),
        ({"bias": torch.randn(4)}, ValueError, "bias: expected shape \\(6,\\)"),
        ({"state": torch.randn(2, 4, 6)}, ValueError, "state: expected shape \\(2, 3, 6\\)"),
        ({"backend": "triton"}, BackendUnavailableError, "no backend 'triton'"),
    ],
)
def test_bad_input_is_refused(options, error, message):
    x, weight, bias, state = draw(2, 5, 6, 4)
    with pytest.raises(error, match=message):
        short_conv(**{"x": x, "weight": weight, "bias": bias, "state": state} | options)
