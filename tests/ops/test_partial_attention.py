"""Partial attention and its merge are one softmax, however the keys are split."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.ops.attention import attention
from attnlab.ops.partial_attention import Partial, merge, partial_attention
from ops.oracle import assert_equal_in_float64


def _inputs(n=5, m=9):
    return torch.randn(2, 3, n, 4), torch.randn(2, 3, m, 4), torch.randn(2, 3, m, 6)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 9), (300, 20)])
def test_eager_equals_the_formula(n, m) -> None:
    allowed = torch.rand(1, 1, n, m) > 0.4
    allowed[:, :, 0] = False

    def run(backend):
        def function(q, k, v, bias):
            output, lse = partial_attention(q, k, v, bias=bias, allowed=allowed, backend=backend)
            return output, lse.masked_fill(lse == float("-inf"), 0.0)

        return function

    assert_equal_in_float64(run("eager"), run("reference"), *_inputs(n, m), torch.randn(1, 3, n, m))


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (37, 37), (300, 300), (5, 9), (300, 20)])
def test_causal_with_masked_keys_equals_the_formula(n, m, masked, allowed) -> None:
    key_mask = None
    if masked:
        key_mask = torch.rand(2, m) > 0.4
        key_mask[0, : m // 2] = False
    pairs = torch.rand(1, 1, n, m) > 0.1 if allowed else None

    def run(backend):
        def function(q, k, v):
            options = {"causal": True, "key_mask": key_mask, "allowed": pairs, "scale": 0.3}
            output, lse = partial_attention(q, k, v, backend=backend, **options)
            return output, lse.masked_fill(lse == float("-inf"), 0.0)

        return function

    q, k, v = _inputs(n, m)
    assert_equal_in_float64(run("eager"), run("reference"), q, k, v)
    assert_equal_in_float64(run("eager"), run("reference"), q, k, v[..., :3])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"allowed": 1}, {"allowed": 6}, {"bias": 6}], ids=str)
def test_grouped_heads_are_repeated_ones(causal, options) -> None:
    q, k, v = (x.double() for x in (torch.randn(2, 6, 7, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 5)))
    slots = {}
    if "allowed" in options:
        slots["allowed"] = torch.rand(2, options["allowed"], 1, 7) > 0.4
    if "bias" in options:
        slots["bias"] = torch.randn(1, options["bias"], 7, 7).double()
    mask = torch.rand(2, 7) > 0.2

    def run(backend, repeats):
        def function(q, k, v):
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
            output, lse = partial_attention(q, k, v, causal=causal, key_mask=mask, backend=backend, **slots)
            return output, lse.masked_fill(lse == float("-inf"), 0.0)

        return function

    assert_equal_in_float64(run("eager", 1), run("reference", 2), q, k, v)


def test_causal_queries_without_a_key_are_empty_and_masked_keys_have_no_influence() -> None:
    q, k, v = _inputs(8, 8)
    key_mask = torch.arange(8).expand(2, -1) >= torch.tensor([[3], [0]])
    part = partial_attention(q, k, v, causal=True, key_mask=key_mask)
    k[0, :, :3] = float("nan")
    v[0, :, :3] = float("inf")
    other = partial_attention(q, k, v, causal=True, key_mask=key_mask)
    assert torch.equal(part.output, other.output)
    assert (other.output[0, :, :3] == 0).all()
    assert (other.lse[0, :, :3] == float("-inf")).all()
    assert other.lse[0, :, 3:].isfinite().all()
    q.requires_grad_()
    merge(part, partial_attention(q, k, v, causal=True, key_mask=key_mask)).output.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


@settings(max_examples=25)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_any_split_in_any_order_is_one_softmax(sizes, random) -> None:
    q, k, v = (x.double() for x in _inputs(m=sum(sizes) + 1))
    edges = [0, 1]
    for size in sizes:
        edges.append(edges[-1] + size)
    parts = [partial_attention(q, k[:, :, a:b], v[:, :, a:b]) for a, b in itertools.pairwise(edges)]
    random.shuffle(parts)
    total = parts[0]
    for part in parts[1:]:
        total = merge(total, part)
    torch.testing.assert_close(total.output, attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_merge_is_differentiable_and_neutral() -> None:
    q, k, v = (x.double() for x in _inputs())

    def merged(q, k, v):
        return merge(partial_attention(q, k[:, :, :4], v[:, :, :4]), partial_attention(q, k[:, :, 4:], v[:, :, 4:])).output

    assert_equal_in_float64(merged, lambda q, k, v: attention(q, k, v, backend="reference"), q, k, v)
    part = partial_attention(q, k, v)
    empty = partial_attention(q, k[:, :, :0], v[:, :, :0])
    both = merge(empty, part)
    assert torch.equal(both.output, part.output)
    assert torch.equal(both.lse, part.lse)
    nothing = merge(empty, Partial(*empty))
    assert (nothing.output == 0).all()
    assert (nothing.lse == float("-inf")).all()


def test_lse_in_float32_for_half_precision() -> None:
    q, k, v = (x.bfloat16() for x in _inputs())
    part = partial_attention(q, k, v)
    causal = partial_attention(*(x[:, :, :5] for x in (q, k, v)), causal=True)
    for found in (part, causal):
        assert found.lse.dtype == torch.float32
        assert found.output.dtype == torch.bfloat16


def test_bad_shapes() -> None:
    q, k, v = _inputs()
    with pytest.raises(ValueError, match="expected"):
        partial_attention(q, k[:, :2], v)
    with pytest.raises(ValueError, match="k: expected a number of heads that divides the 3"):
        partial_attention(q, k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match="key_mask: expected"):
        partial_attention(q, k, v, key_mask=torch.ones(2, 5, dtype=torch.bool))
