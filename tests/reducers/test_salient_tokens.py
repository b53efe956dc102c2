"""The selector of salient tokens, by sorting."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab import Tokens, create_reducer


def _tokens(mask=None, n: int = 8, prefix: int = 1) -> Tokens:
    x = torch.randn(2, n, 4, dtype=torch.float64)
    maps = torch.rand(2, n, n, dtype=torch.float64)
    return Tokens(x, mask=mask, grid=(n - prefix,), num_prefix=prefix, sizes=torch.rand(2, n), streams={"rollout": maps})


@pytest.mark.tier("T2", "reducer:salient_tokens")
@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 1.0])
def test_keeps_the_largest_of_the_class_row(prefix, ratio) -> None:
    mask = torch.tensor([[True] * 8, [True, True, False, True, False, True, True, True]])
    tokens = _tokens(mask, prefix=prefix)
    kept = create_reducer("salient_tokens", 4, ratio=ratio)(tokens)
    for b in range(2):
        others = [t for t in range(prefix, 8) if mask[b, t]]
        count = max(1, math.ceil(round(ratio * len(others), 6)))
        row = tokens.streams["rollout"][b, 0].tolist()
        best = sorted(sorted(others, key=lambda t: -row[t])[:count])
        expected = [*range(prefix), *best]
        assert int(kept.mask[b].sum()) == len(expected)
        assert torch.equal(kept.x[b, kept.mask[b]], tokens.x[b, expected])
        assert torch.equal(kept.sizes[b, kept.mask[b]], tokens.sizes[b, expected])
        assert not kept.x[b, ~kept.mask[b]].any()
    assert (kept.num_prefix, kept.grid) == (prefix, None)


def test_without_a_mask_there_is_none_after() -> None:
    kept = create_reducer("salient_tokens", 4, ratio=0.3)(_tokens())
    assert kept.mask is None
    assert kept.x.shape == (2, 1 + 3, 4)


def test_what_stands_at_masked_tokens_and_their_weights_change_nothing() -> None:
    mask = torch.arange(8).expand(2, -1) < 6
    tokens = _tokens(mask)
    selector = create_reducer("salient_tokens", 4, ratio=0.5)
    first = selector(tokens)
    tokens.streams["rollout"][:, :, 6:] = 100.0
    second = selector(tokens.with_x(tokens.x.masked_fill(~mask[..., None], float("nan"))))
    assert torch.equal(first.x, second.x)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="ratio"):
        create_reducer("salient_tokens", 4, ratio=0.0)
    selector = create_reducer("salient_tokens", 4)
    with pytest.raises(ValueError, match="num_prefix"):
        selector(_tokens(prefix=0))
    with pytest.raises(ValueError, match="streams"):
        create_reducer("salient_tokens", 4, stream="scores")(_tokens())
    with pytest.raises(ValueError, match="shape"):
        selector(Tokens(torch.randn(2, 8, 4), num_prefix=1, streams={"rollout": torch.rand(2, 7, 7)}))
