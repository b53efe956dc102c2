"""Quest against its definition written out, its bound, its limits and its stream."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer, record
from attnlab.core.errors import UnsupportedError
from attnlab.mixers.sparse.frontier_rules import page_bounds, page_scores
from mixers.definition import assert_defined_by, build, split_heads, tokens
from mixers.pattern_definition import over_keys


def bound(q: Tensor, page: Tensor) -> float:
    """The card's score of one page, by loops."""
    return sum(max(float(q[c] * page[:, c].min()), float(q[c] * page[:, c].max())) for c in range(len(q)))


@pytest.mark.tier("T2", "mixer:quest")
@pytest.mark.parametrize(("b", "p", "share"), [(2, 2, False), (3, 1, False), (1, 4, True), (4, 1, True)])
def test_equals_its_definition(b, p, share) -> None:
    mixer = build("quest", 12, 4, page=b, num_pages=p, share_pages=share)
    x = tokens(13, 12, 1)
    q, k = (split_heads(proj(x)[0].detach(), 4) for proj in (mixer.q_proj, mixer.k_proj))

    def keys(h: int, i: int, n: int) -> list[int]:
        own = i // b
        scores = {r: bound(q[h][i], k[h][r * b : r * b + b]) for r in range(own)}
        pages = [*sorted(scores, key=lambda r: -scores[r])[:p], own]
        return [j for j in range(i + 1) if j // b in pages]

    assert_defined_by(mixer, over_keys(mixer, keys), x)


def test_heads_that_share_keys_share_pages() -> None:
    mixer = build("quest", 8, 4, page=2, num_pages=2, share_pages=True, num_kv_heads=2)
    with record(mixer, only=["selection"]) as tape:
        mixer(tokens(15, 8))
    chosen = tape["selection"]
    assert torch.equal(chosen[:, 0], chosen[:, 1])
    assert torch.equal(chosen[:, 2], chosen[:, 3])
    assert not torch.equal(chosen[:, 0], chosen[:, 2])


@given(st.integers(0, 1000))
@settings(max_examples=10)
def test_the_score_bounds_every_product(seed) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(1, 2, 5, 3), torch.randn(1, 2, 12, 3)
    low, high, _ = page_bounds(k, 4, None)
    products = (q @ k.mT).unflatten(-1, (3, 4)).amax(-1)
    assert bool((page_scores(q, low, high) >= products - 1e-5).all())


def test_all_pages_are_dense_attention() -> None:
    mixer, dense = build("quest", page=3, num_pages=9), build("softmax", causal=True)
    dense.load_state_dict(mixer.state_dict())
    x = tokens(13)
    torch.testing.assert_close(mixer(x), dense(x))


@settings(max_examples=15)
@given(st.data())
def test_any_split_and_mask(data) -> None:
    b, p, n = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    options = {"share_pages": data.draw(st.booleans()), "position": data.draw(st.sampled_from(["none", "rotary"]))}
    mixer = build("quest", 8, 4, page=b, num_pages=p, num_kv_heads=2, **options)
    x = torch.randn(2, n, 8, dtype=torch.float64)
    mask = torch.rand(2, n) > 0.4 if data.draw(st.booleans()) else None
    state, outputs, start = mixer.init_state(2), [], 0
    while start < n:
        part = slice(start, start + data.draw(st.integers(1, n - start)))
        y, state = mixer.extend(x[:, part], state, mask=None if mask is None else mask[:, part])
        outputs.append(y)
        start = part.stop
        assert state["low"].shape[2] == start // b
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x, mask=mask))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="page: expected at least 1"):
        create_mixer("quest", 8, 2, page=0)
    with pytest.raises(ValueError, match="position: expected 'none' or 'rotary'"):
        create_mixer("quest", 8, 2, position="alibi")
    with pytest.raises(UnsupportedError, match="causal=False"):
        create_mixer("quest", 8, 2, causal=False)
