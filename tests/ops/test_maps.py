"""Indicators of attention maps, held against loops over the entries."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from attnlab.ops.maps import attention_entropy, concentration, entropy_lower_bound, head_diversity, local_focus, sink

B, H, N, M = 2, 3, 5, 5


@pytest.fixture
def masks() -> dict[str, Tensor]:
    return {
        "query_mask": torch.tensor([[False, True, True, True, True], [True, True, False, True, False]]),
        "key_mask": torch.tensor([[False, True, True, True, True], [True, True, False, True, False]]),
    }


@pytest.fixture
def weights(masks) -> Tensor:
    """A causal map with zeros, masked keys and one empty row."""
    logits = torch.randn(B, H, N, M, dtype=torch.float64)
    allowed = torch.ones(N, M, dtype=torch.bool).tril() & masks["key_mask"][:, None, None, :]
    allowed = allowed.expand(B, H, -1, -1).clone()
    allowed[1, 2, 3] = False
    weights = logits.exp() * allowed
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)


def _rows(weights: Tensor, masks: dict[str, Tensor], b: int, h: int) -> dict[int, list[float]]:
    """The rows that count, each with its index."""
    rows = {i: weights[b, h, i].tolist() for i in range(N) if masks["query_mask"][b, i]}
    return {i: row for i, row in rows.items() if any(row)}


def _table(function) -> Tensor:
    return torch.tensor([[function(b, h) for h in range(H)] for b in range(B)], dtype=torch.float64)


def test_entropy(weights, masks):
    def by_hand(b: int, h: int) -> float:
        return statistics.fmean(-sum(a * math.log(a) for a in row if a) for row in _rows(weights, masks, b, h).values())

    torch.testing.assert_close(attention_entropy(weights, **masks), _table(by_hand), rtol=1e-12, atol=1e-12)


def test_entropy_at_its_ends_and_its_gradient():
    uniform, single = torch.full((1, 1, 4, 8), 1 / 8), torch.eye(4)[None, None].requires_grad_()
    assert attention_entropy(uniform).item() == pytest.approx(math.log(8))
    entropy = attention_entropy(single)
    entropy.sum().backward()
    assert entropy.item() == 0.0 and torch.isfinite(single.grad).all()
    assert attention_entropy(torch.zeros(1, 2, 3, 4)).tolist() == [[0.0, 0.0]]


def test_masked_tokens_do_not_count(weights, masks):
    poisoned = weights.masked_fill(~masks["query_mask"][:, None, :, None], float("nan"))
    poisoned = poisoned.masked_fill(~masks["key_mask"][:, None, None, :], float("nan"))
    for indicator in (attention_entropy, concentration, head_diversity, sink, local_focus):
        assert torch.equal(indicator(poisoned, **masks), indicator(weights, **masks)), indicator.__name__


def test_the_bound_holds_and_is_reached():
    n = 6
    for s in (0.0, 0.5, 2.0, 8.0):
        bound = entropy_lower_bound(s, n)
        spread = torch.full((n,), -1 / math.sqrt(n * (n - 1)), dtype=torch.float64)
        spread[0] = math.sqrt((n - 1) / n)
        assert float(spread.norm()) == pytest.approx(1.0)
        reached = torch.softmax(s * spread, 0)[None, None, None]
        assert attention_entropy(reached).item() == pytest.approx(bound.item(), rel=1e-9, abs=1e-12)
        logits = torch.randn(400, n, dtype=torch.float64)
        others = torch.softmax(s * logits / logits.norm(dim=-1, keepdim=True), -1)
        assert float(attention_entropy(others[:, None, None]).min()) >= bound.item() - 1e-12
    assert entropy_lower_bound(0.0, n).item() == pytest.approx(math.log(n))
    assert entropy_lower_bound(3, 1).item() == 0.0
    falling = entropy_lower_bound(torch.tensor([1.0, 5.0, 10.0, 50.0]), n)
    assert (falling.diff() < 0).all() and falling[-1] >= 0


def test_concentration(weights, masks):
    def by_hand(b: int, h: int) -> float:
        return math.sqrt(sum(a * a for row in _rows(weights, masks, b, h).values() for a in row))

    torch.testing.assert_close(concentration(weights, **masks), _table(by_hand), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_head_diversity(weights, masks, causal):
    expected = []
    for b in range(B):
        pairs = [
            (i, j)
            for i in range(N)
            for j in range(M)
            if masks["query_mask"][b, i] and masks["key_mask"][b, j] and (j <= i or not causal)
        ]
        expected.append(statistics.fmean(statistics.pstdev(weights[b, :, i, j].tolist()) for i, j in pairs))
    got = head_diversity(weights, causal=causal, **masks)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_head_diversity_of_like_heads_is_zero_with_a_zero_gradient():
    same = torch.rand(1, 1, 4, 4).expand(1, 3, 4, 4).clone().requires_grad_()
    diversity = head_diversity(same)
    diversity.sum().backward()
    assert diversity.item() == 0.0 and same.grad.abs().max() == 0.0
    assert head_diversity(torch.rand(2, 1, 4, 4)).tolist() == [0.0, 0.0]


def test_sink_is_the_first_real_key(weights, masks):
    first = [1, 0]

    def by_hand(b: int, h: int) -> float:
        return statistics.fmean(row[first[b]] for row in _rows(weights, masks, b, h).values())

    torch.testing.assert_close(sink(weights, **masks), _table(by_hand), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("distance", [0, 1, 3, 7])
def test_local_focus(weights, masks, distance):
    def by_hand(b: int, h: int) -> float:
        rows = _rows(weights, masks, b, h)
        found = [row[i - distance] for i, row in rows.items() if i >= distance and masks["key_mask"][b, i - distance]]
        return statistics.fmean(found) if found else 0.0

    torch.testing.assert_close(local_focus(weights, distance, **masks), _table(by_hand), rtol=1e-12, atol=1e-12)


def test_the_last_query_stands_at_the_last_key():
    last = torch.rand(1, 1, 1, 6)
    assert local_focus(last, 2).item() == pytest.approx(last[0, 0, 0, 3].item())


def test_bad_input_is_named(weights):
    with pytest.raises(ValueError, match="num_keys: expected at least 1, got 0"):
        entropy_lower_bound(1.0, 0)
    with pytest.raises(ValueError, match="distance: expected 0 or more, got -1"):
        local_focus(weights, -1)
