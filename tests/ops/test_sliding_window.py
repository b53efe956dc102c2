"""Sliding-window attention: blocks against the formula over all pairs, sinks, masks, empty rows, precision, refusals."""

from __future__ import annotations

import functools

import pytest
import torch

from attnlab.core.errors import BackendUnavailableError
from attnlab.ops.sliding_window import blocks, eager, reference, sliding_window_attention
from ops.oracle import assert_equal_in_float64, assert_within_budget, relative_error

# b, h, hk, n, m, d, e
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 2, 3, 3, 4, 4),
    (2, 4, 2, 1, 37, 3, 5),
    (1, 2, 2, 3, 70, 4, 4),
    (2, 6, 2, 67, 61, 3, 5),
    (1, 3, 1, 131, 131, 4, 2),
    (1, 2, 2, 200, 67, 2, 2),
    (1, 2, 1, 64, 200, 2, 2),
]
WINDOWS = [(0, 0, 0), (5, 0, 0), (3, 2, 0), (0, 3, 2), (7, 0, 1), (20, 1, 40), (1000, 0, 3), (1000, 1000, 1000), (250, 0, 0)]


def draw(b, h, hk, n, m, d, e):
    return torch.randn(b, h, n, d), torch.randn(b, hk, m, d), torch.randn(b, hk, m, e)


def both(left, right=0, num_sinks=0, **options):
    """The eager and the reference form as functions of q, k and v."""
    window = functools.partial(sliding_window_attention, left=left, right=right, num_sinks=num_sinks, **options)
    return functools.partial(window, backend="eager"), functools.partial(window, backend="reference")


def some_real_keys(b, m):
    """A mask with half of the keys, and in the last sequence the later half only, so that its first queries have none."""
    mask = torch.rand(b, m) > 0.5
    mask[-1] = torch.arange(m) >= (m + 1) // 2
    return mask


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_equal_the_formula(shape, window):
    assert_equal_in_float64(*both(*window, scale=0.7), *draw(*shape))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_a_key_mask_and_nan_behind_it(shape, window):
    mask = some_real_keys(shape[0], shape[4])
    nan = torch.where(mask, 0.0, torch.nan).double()[:, None, :, None]
    fast, slow = (lambda q, k, v, form=form: form(q, k + nan, v + nan) for form in both(*window, key_mask=mask))
    assert_equal_in_float64(fast, slow, *draw(*shape))


@pytest.mark.parametrize("size", [1, 40_000])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_of_any_size(monkeypatch, size, masked):
    monkeypatch.setattr(eager, "CHUNK", {"cpu": size})
    mask = some_real_keys(3, 100) if masked else None
    assert_equal_in_float64(*both(40, 3, 5, key_mask=mask), *draw(3, 4, 2, 100, 100, 4, 4))


def test_wide_windows_take_longer_blocks():
    narrow, wide = (blocks.Plan.of(4096, 4096, left, 0, 1).block for left in (31, 255))
    assert (narrow, wide) == (32, 64)
    assert_equal_in_float64(*both(255), *draw(1, 1, 1, 600, 600, 2, 2))


def test_the_pairs_that_take_part():
    allowed = reference.allowed_pairs(3, 6, left=1, right=1, num_sinks=1)
    assert allowed.int().tolist() == [[1, 0, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1], [1, 0, 0, 0, 1, 1]]
    before_all_keys = reference.allowed_pairs(3, 1, left=5, right=1, num_sinks=1)
    assert before_all_keys.int().tolist() == [[0], [1], [1]]


def test_a_full_window_is_causal_attention():
    q, k, v = draw(2, 3, 3, 50, 50, 8, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(sliding_window_attention(q, k, v, left=49), expected)


@pytest.mark.parametrize("n", [1, 40])
def test_queries_without_keys_give_zero_and_zero_gradients(n):
    tensors = [t.requires_grad_() for t in draw(2, 4, 2, n, 40, 4, 4)]
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[1, :20] = True
    out = sliding_window_attention(*tensors, left=9, key_mask=mask)
    empty = torch.ones(2, n, dtype=torch.bool)
    if n > 1:
        empty[1, :29] = False
    assert torch.equal((out == 0).all(-1).all(1), empty)
    for gradient in torch.autograd.grad(out, tensors, torch.randn_like(out)):
        assert torch.isfinite(gradient).all()
        assert not gradient[0].any()
        if gradient.shape[2] == n:
            assert not gradient[1, :, empty[1]].any()


def test_no_keys_at_all():
    assert not sliding_window_attention(*draw(2, 2, 1, 3, 0, 4, 5), left=3).any()
    assert sliding_window_attention(*draw(2, 2, 1, 0, 3, 4, 5), left=3).shape == (2, 2, 0, 5)


@pytest.mark.parametrize(("left", "num_sinks"), [(9, 0), (9, 3), (100, 0)])
def test_token_by_token_equals_one_pass(left, num_sinks):
    q, k, v = (t.double() for t in draw(2, 4, 2, 40, 40, 4, 4))
    whole = sliding_window_attention(q, k, v, left=left, num_sinks=num_sinks)
    steps = [
        sliding_window_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], left=left, num_sinks=num_sinks)
        for t in range(40)
    ]
    assert relative_error(torch.cat(steps, 2), whole) < 1e-12


def test_one_token_is_one_call_of_sdpa(monkeypatch):
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **options: calls.append(args) or sdpa(*args, **options)
    )
    q, k, v = draw(1, 8, 2, 1, 50, 4, 4)
    sliding_window_attention(q, k, v, left=63)
    assert [(x.shape, x.data_ptr()) for x in calls[0][1:]] == [(x.shape, x.data_ptr()) for x in (k, v)]
    assert len(calls) == 1


def test_large_scores_do_not_overflow():
    q, k, v = (t.double() for t in draw(1, 1, 1, 80, 80, 4, 4))
    fast, slow = both(9, num_sinks=2)
    assert relative_error(fast(1e3 * q, 1e3 * k, v), slow(1e3 * q, 1e3 * k, v)) < 1e-9


def test_float32_is_as_precise_as_the_formula():
    assert_within_budget(*both(60, 3, 2), torch.float32, *draw(1, 4, 2, 300, 300, 16, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_in_float32(dtype):
    narrow = [t.to(dtype) for t in draw(1, 2, 1, 70, 70, 8, 8)]
    out = sliding_window_attention(*narrow, left=20)
    assert out.dtype == dtype
    assert torch.equal(out, sliding_window_attention(*(t.float() for t in narrow), left=20).to(dtype))


@pytest.mark.parametrize("n", [1, 70])
def test_autocast_changes_nothing(n):
    tensors = [t.requires_grad_() for t in draw(1, 4, 2, n, 70, 8, 8)]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = sliding_window_attention(*tensors, left=20, num_sinks=1)
            found.append((out, *torch.autograd.grad(out.sum(), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_mixed_dtypes_meet_in_the_widest():
    q, k, v = draw(1, 2, 1, 9, 9, 4, 4)
    assert sliding_window_attention(q.bfloat16(), k, v, left=2).dtype == torch.float32
    assert sliding_window_attention(q.bfloat16(), k, v.double(), left=2).dtype == torch.float64


def test_strided_inputs_and_heads_last():
    tensors = [torch.randn(2, 90, heads, 4).double().transpose(1, 2) for heads in (4, 2, 2)]
    fast, slow = both(9, num_sinks=2)
    assert relative_error(fast(*tensors), slow(*tensors)) < 1e-12


def test_no_scores_are_saved_for_the_backward():
    sizes = []
    tensors = [t.requires_grad_() for t in draw(1, 2, 1, 512, 512, 8, 8)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        sliding_window_attention(*tensors, left=100)
    assert 0 < max(sizes) <= 2 * 512 * 8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"q": torch.randn(2, 5, 8)}, ValueError, "q: expected 4 axes"),
        ({"q": torch.ones(2, 4, 5, 8, dtype=torch.int64)}, TypeError, "q: expected a floating"),
        ({"q": torch.randn(2, 3, 5, 8)}, ValueError, "k: expected a number of heads that divides the 3 of q, got 2"),
        ({"q": torch.randn(1, 4, 5, 8)}, ValueError, "k: expected the batch and width of q"),
        ({"k": torch.randn(2, 2, 5, 7)}, ValueError, "k: expected the batch and width of q"),
        ({"v": torch.randn(2, 2, 4, 8)}, ValueError, "v: expected batch, heads and tokens of k"),
        ({"left": -1}, ValueError, "left: expected an integer >= 0, got -1"),
        ({"right": -1}, ValueError, "right: expected"),
        ({"num_sinks": -2}, ValueError, "num_sinks: expected"),
        ({"key_mask": torch.ones(2, 5)}, TypeError, "key_mask: expected bool"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "key_mask: expected shape \\(2, 5\\)"),
        ({"backend": "triton"}, BackendUnavailableError, "no backend 'triton'"),
    ],
)
def test_bad_input_is_refused(options, error, message):
    q, k, v = draw(2, 4, 2, 5, 5, 8, 8)
    arguments = {"q": q, "k": k, "v": v, "left": 2} | options
    with pytest.raises(error, match=message):
        sliding_window_attention(**arguments)
