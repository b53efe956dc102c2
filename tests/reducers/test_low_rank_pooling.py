"""Low-rank attention pooling by its definition, and the laws of a reducer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import Tokens, UnknownNameError, create_reducer, list_reducers, record, reducer_info

D = torch.float64


def _build(**options):
    reducer = create_reducer("low_rank_pooling", 6, dtype=D, **{"num_heads": 3} | options)
    with torch.no_grad():
        for parameter in reducer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return reducer


def _by_hand(reducer, bag: Tensor, activation) -> tuple[Tensor, list[list[Tensor]]]:
    """The pooled vectors of one bag of real tokens, and the weights of each head."""
    m, k = reducer.num_heads, reducer.rank
    p, q = reducer.context_proj.weight, reducer.token_proj.weight  # rows: columns of P and Q
    context = sum(bag) / len(bag) if reducer.context is None else reducer.context
    scores = []
    for token in bag:
        e = [activation(sum((p[r] @ context) * (q[r] @ token) for r in range(i * k, i * k + k))) for i in range(m)]
        length = torch.sqrt(sum(value**2 for value in e))
        scores.append([value / length for value in e])
    weights = []
    for i in range(m):
        total = sum(torch.exp(score[i]) for score in scores)
        weights.append([torch.exp(score[i]) / total for score in scores])
    return torch.stack([sum(w * token for w, token in zip(row, bag, strict=True)) for row in weights]), weights


@pytest.mark.tier("T2", "reducer:low_rank_pooling")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("options", "activation"),
    [
        ({}, torch.tanh),
        ({"rank": 3}, torch.tanh),
        ({"context": "learned", "num_heads": 4}, torch.tanh),
        ({"rank": 2, "activation": "identity"}, lambda e: e),
    ],
)
def test_equals_its_definition(options, activation, masked):
    reducer = _build(**options)
    x = torch.randn(2, 5, 6, dtype=D, requires_grad=True)
    mask = torch.tensor([[False, True, True, False, True], [True, True, True, True, False]]) if masked else None
    ours = reducer(Tokens(x, mask)).x
    bags = [x[b] if mask is None else x[b][mask[b]] for b in range(2)]
    theirs = torch.stack([_by_hand(reducer, bag, activation)[0] for bag in bags])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    leaves, direction = [x, *reducer.parameters()], torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * direction).sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("context", ["mean", "learned"])
def test_padding_never_leaks(context, poison):
    reducer = _build(context=context)
    x = torch.randn(3, 7, 6, dtype=D)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1], [1, 0, 0, 1, 0, 1, 0]], dtype=torch.bool)
    poisoned = x.masked_fill(~mask[..., None], poison).requires_grad_()
    got = reducer(Tokens(poisoned, mask)).x
    assert torch.equal(got, reducer(Tokens(x, mask)).x)
    got.sum().backward()
    assert (poisoned.grad[~mask] == 0).all() and poisoned.grad[mask].abs().max() > 0
    for b in range(3):
        torch.testing.assert_close(reducer(Tokens(x[b : b + 1, mask[b]])).x[0], got[b], rtol=1e-10, atol=1e-12)


def test_the_order_of_the_tokens_makes_no_difference():
    reducer, x = _build(rank=2), torch.randn(2, 8, 6, dtype=D)
    order = torch.randperm(8)
    torch.testing.assert_close(reducer(Tokens(x[:, order])).x, reducer(Tokens(x)).x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16, torch.float16])
def test_an_empty_bag_gives_zeros(dtype):
    reducer = create_reducer("low_rank_pooling", 6, dtype=dtype)
    x = torch.randn(2, 4, 6, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[False] * 4, [True] * 4])
    out = reducer(Tokens(x, mask))
    assert (out.x[0] == 0).all() and not out.mask[0].any() and out.mask[1].all()
    assert out.x.dtype == dtype and torch.isfinite(out.x).all()
    out.x.sum().backward()
    assert (x.grad[0] == 0).all() and all(torch.isfinite(p.grad).all() for p in reducer.parameters())


def test_a_token_of_zeros_is_pooled_with_finite_gradients():
    reducer, x = _build(), torch.randn(1, 4, 6, dtype=D)
    x[0, 2] = 0
    x.requires_grad_()
    reducer(Tokens(x)).x.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_what_comes_out_and_what_is_recorded():
    reducer, x = _build(), torch.randn(2, 6, 6, dtype=D)
    with record(reducer) as tape:
        out = reducer(Tokens(x, grid=(2, 3), streams={"scores": x}))
    assert out.x.shape == (2, 3, 6) and out.mask is None and out.grid is None and set(out.streams) == {"scores"}
    weights = tape["attention"].detach()
    assert weights.shape == (2, 3, 1, 6)
    torch.testing.assert_close(weights.squeeze(2) @ x, out.x)
    assert float((weights.amax(-1) / weights.amin(-1)).max()) <= math.e**2
    expected = 0.0
    for b in range(2):
        rows = _by_hand(reducer, x[b], torch.tanh)[1]
        for i in range(3):
            for j in range(3):
                product = sum(u * v for u, v in zip(rows[i], rows[j], strict=True))
                expected += (float(product.detach()) - (i == j)) ** 2
    assert float(tape["diversity_penalty"].detach()) == pytest.approx(expected / 2, rel=1e-9)


def test_parameters_are_two_columns_a_head():
    assert sum(p.numel() for p in create_reducer("low_rank_pooling", 100, num_heads=5).parameters()) == 2 * 100 * 5


def test_the_registry_and_its_refusals():
    assert "low_rank_pooling" in list_reducers(family="pooling")
    assert reducer_info("low_rank_pooling").paper == "lama-low-rank-attention"
    with pytest.raises(UnknownNameError, match="'low_rank_pooling'"):
        create_reducer("low_rank_poling", 8)
    for options, message in (
        ({"num_heads": 0}, "num_heads: expected a positive integer, got 0"),
        ({"rank": 0}, "rank: expected a positive integer, got 0"),
        ({"activation": "gelu"}, "activation: expected one of .*got 'gelu'"),
        ({"context": "max"}, "context: expected 'mean' or 'learned', got 'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            create_reducer("low_rank_pooling", 8, **options)
    with pytest.raises(ValueError, match="dim: expected a positive integer, got 0"):
        create_reducer("low_rank_pooling", 0)
    with pytest.raises(ValueError, match=r"tokens: expected x of shape .* 6\), got"):
        _build()(Tokens(torch.randn(2, 3, 5, dtype=D)))
