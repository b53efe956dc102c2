"""Dense attention: SDPA and blocks of queries, with every slot, against the formula."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab import UnknownNameError
from attnlab.ops.attention import NORMALIZERS, ClippedSoftmax, Pairwise, TopKSoftmax, attention
from ops.oracle import assert_equal_in_float64, assert_within_budget


def _inputs(b=2, h=4, hk=2, n=7, m=7, d=5, e=3):
    return torch.randn(b, h, n, d), torch.randn(b, hk, m, d), torch.randn(b, hk, m, e)


def _both(**options):
    """The eager and the reference form as functions of q, k, v and, where given, a bias."""

    def form(backend):
        def function(q, k, v, bias=None):
            return attention(q, k, v, bias=bias, backend=backend, **options)

        return function

    return form("eager"), form("reference")


@pytest.mark.parametrize("normalizer", sorted(NORMALIZERS))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 6), (3, 9), (17, 17), (9, 4)])
def test_all_masks_together(normalizer, causal, n, m) -> None:
    key_mask = torch.rand(2, m) > 0.3
    key_mask[0] = False
    pair_mask = torch.rand(1, 4, n, m) > 0.3
    pair_mask[:, :, 0] = False
    for masks in ({}, {"key_mask": key_mask}, {"pair_mask": pair_mask}, {"key_mask": key_mask, "pair_mask": pair_mask}):
        fast, slow = _both(causal=causal, normalizer=normalizer, **masks)
        assert_equal_in_float64(fast, slow, *_inputs(n=n, m=m))
        assert_equal_in_float64(fast, slow, *_inputs(n=n, m=m), torch.randn(1, 4, n, m))


@pytest.mark.parametrize("normalizer", [*sorted(NORMALIZERS), ClippedSoftmax(-0.2, 1.1), TopKSoftmax(3)])
def test_more_queries_than_a_block(normalizer) -> None:
    fast, slow = _both(causal=True, normalizer=normalizer, key_mask=torch.rand(1, 300) > 0.2)
    assert_equal_in_float64(fast, slow, *_inputs(b=1, h=2, hk=1, n=300, m=300), torch.randn(1, 2, 300, 300))


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", ClippedSoftmax(-0.05)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("b", "n", "m"), [(2, 1, 1), (2, 1, 5), (3, 7, 7), (2, 4, 9), (2, 9, 4), (1, 280, 270)])
def test_terms_by_offset(normalizer, causal, b, n, m) -> None:
    rows, key_mask = n + m - 1, torch.rand(b, m) > 0.2

    def form(backend):
        def function(q, k, v, offsets, keys, dense, factor, factor_offsets):
            bias, weight = Pairwise(dense, offsets, keys), Pairwise(factor, factor_offsets)
            options = {"causal": causal, "key_mask": key_mask, "normalizer": normalizer, "backend": backend}
            return attention(q, k, v, bias=bias, factor=weight, **options)

        return function

    tables = torch.randn(4, rows), torch.randn(1, rows, 5), torch.randn(1, 4, 1, m), torch.rand(1, 1, n, m), torch.randn(4, rows)
    assert_equal_in_float64(form("eager"), form("reference"), *_inputs(b=b, n=n, m=m), *tables)


def test_rows_by_offset_run_from_the_first_key_of_the_last_query() -> None:
    q, k, eye = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), torch.eye(3)[None, None]
    weights = attention(q, k, eye, bias=Pairwise(offsets=torch.arange(4.0)[None]), normalizer="identity")
    assert weights[0, 0].tolist() == [[1.0, 2.0, 3.0], [0.0, 1.0, 2.0]]


def test_what_normalisers_are_for() -> None:
    q, k, eye = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 4, 4), torch.eye(4)[None, None]
    bias = torch.tensor([[-30.0, -31.0, -30.5, -29.0]])[None, None]
    assert float(attention(q, k, eye, bias=bias, normalizer="softmax_plus_one").sum()) < 1e-12
    spread = torch.tensor([[0.0, 4.0, 8.0, 8.1]])[None, None]
    clipped = attention(q, k, eye, bias=spread, normalizer=ClippedSoftmax(-0.03))[0, 0, 0]
    assert (clipped[:2] == 0).all() and (clipped[2:] > 0.4).all()
    assert int((attention(q, k, eye, normalizer=TopKSoftmax(2)) > 0).sum()) == 2  # all logits tie


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_error_budget(dtype, causal) -> None:
    key_mask = torch.rand(2, 33) > 0.2
    fast, slow = _both(causal=causal, key_mask=key_mask)
    assert_within_budget(fast, slow, dtype, *_inputs(n=33, m=33))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalizer", ["softmax", "softmax_plus_one", "sigmoid", "tanh", ClippedSoftmax(-0.01)])
def test_error_budget_of_the_blocks(dtype, normalizer) -> None:
    def form(backend):
        def function(q, k, v, offsets, factor):
            bias, weight = Pairwise(offsets=offsets), Pairwise(offsets=factor)
            return attention(q, k, v, bias=bias, factor=weight, causal=True, normalizer=normalizer, backend=backend)

        return function

    inputs = *_inputs(n=33, m=33), torch.randn(4, 65), torch.randn(4, 65)
    assert_within_budget(form("eager"), form("reference"), dtype, *inputs)


def test_an_empty_row_is_zero_and_passes_no_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in _inputs())
    key_mask = torch.ones(2, 7, dtype=torch.bool)
    key_mask[1] = False
    out = attention(q, k, v, key_mask=key_mask, causal=True)
    out.square().sum().backward()
    assert (out[1] == 0).all()
    assert all((x.grad[1] == 0).all() and torch.isfinite(x.grad).all() for x in (q, k, v))


def test_a_masked_key_may_hold_anything_finite() -> None:
    q, k, v = _inputs()
    key_mask = torch.ones(2, 7, dtype=torch.bool)
    key_mask[:, 2] = False
    expected = attention(q, k, v, key_mask=key_mask, causal=True)
    k[:, :, 2], v[:, :, 2] = 1e4, -1e6
    assert torch.equal(attention(q, k, v, key_mask=key_mask, causal=True), expected)


def test_grouped_heads_equal_repeated_ones() -> None:
    q, k, v = _inputs()
    repeated = attention(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1), causal=True)
    torch.testing.assert_close(attention(q, k, v, causal=True), repeated)


def test_sigmoid_weights_do_not_sum_to_one() -> None:
    q, k, _ = _inputs(hk=4)
    weights = attention(q, k, torch.eye(7).expand(2, 4, 7, 7), normalizer="sigmoid", scale=1.0)
    torch.testing.assert_close(weights, torch.sigmoid(q @ k.transpose(-1, -2)))


def test_the_custom_ops_are_whole() -> None:
    q, k, v = (torch.randn(2, 6, 4, 4).transpose(1, 2).requires_grad_() for _ in range(3))  # as a layer's projections lie
    dense = torch.randn(1, 4, 6, 6).transpose(2, 3).requires_grad_()
    tables = torch.randn(4, 11, requires_grad=True), torch.randn(4, 11, 4, requires_grad=True)
    terms = (dense, *tables, torch.rand(1, 1, 6, 6, requires_grad=True), torch.randn(4, 11, requires_grad=True))
    rest = (torch.rand(2, 6) > 0.3, None, 0.5, True, "clipped_softmax", [-0.03, 1.0])
    forward, backward = torch.ops.attnlab.blockwise_attention_forward, torch.ops.attnlab.blockwise_attention_backward
    torch.library.opcheck(forward.default, (q, k, v, *terms, *rest))
    grad = torch.randn(2, 4, 6, 4)
    for needed in ([True] * 8, [True] * 3 + [False] * 5):
        arguments = (grad, q, k, v, *terms, *rest, needed)
        torch.library.opcheck(backward.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_bad_input() -> None:
    q, k, v = _inputs()
    with pytest.raises(ValueError, match="number of heads that divides"):
        attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="4 dimensions"):
        attention(q[0], k, v)
    with pytest.raises(ValueError, match="k, v: expected shapes"):
        attention(q, k, v[:, :, :3])
    with pytest.raises(ValueError, match="k: expected shape"):
        attention(q, k[..., :3], v)
    with pytest.raises(UnknownNameError, match="did you mean 'softmax'"):
        attention(q, k, v, normalizer="softmx")
    with pytest.raises(ValueError, match="gamma: expected at most 0"):
        ClippedSoftmax(0.1)
    with pytest.raises(ValueError, match="k: expected a positive integer"):
        TopKSoftmax(0)
    with pytest.raises(ValueError, match=r"bias\.offsets: expected n \+ m - 1 = 13 rows"):
        attention(q, k, v, bias=Pairwise(offsets=torch.zeros(4, 12)))
    with pytest.raises(ValueError, match=r"factor\.keys: expected None"):
        attention(q, k, v, factor=Pairwise(keys=torch.zeros(4, 13, 5)))
    with pytest.raises(UnknownNameError, match="did you mean 'eager'"):
        attention(q, k, v, backend="eagre")


@pytest.mark.parametrize("width", [4, 8, 40])
def test_a_key_mask_beside_causality_makes_no_matrix(width):
    """Weights of n x n would be what SDPA makes where its fused kernel steps aside."""
    n = 300
    q, k = (torch.randn(1, 2, n, 8) for _ in range(2))
    v = torch.randn(1, 2, n, width)
    with Sizes() as seen:
        attention(q, k, v, causal=True, key_mask=torch.rand(1, n) > 0.2)
    assert seen.largest < 2 * n * n


class Sizes(TorchDispatchMode):
    """The most numbers in a tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out
