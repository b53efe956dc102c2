"""The keys that agree best against a sort of all of them, in both implementations; sets of bits against Python's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.ops import bit_sets
from attnlab.ops.backends import use_backend
from attnlab.ops.code_agreement import agreeing_keys, eager


def by_sorting(queries, keys, count, steps, causal, mask):
    """A set of places for each query."""
    parts = queries.shape[-1]
    found = []
    for example, (of_q, of_k) in enumerate(zip(queries, keys, strict=True)):
        for a, b in zip(of_q.tolist(), of_k.tolist(), strict=True):
            for i, own in enumerate(a):
                slots = {}
                for j, other in enumerate(b):
                    if (mask is None or mask[example, j]) and (j <= i or not causal):
                        agree = sum(x == y for x, y in zip(own, other, strict=True))
                        slots[j] = min(steps, agree // max(1, parts // (steps + 1)))
                found.append(set(sorted(slots, key=lambda j: (-slots[j], j))[:count]))
    return found


@settings(max_examples=25)
@given(st.data())
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_equals_a_sort(backend, data):
    n, m, parts = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9))
    count, steps, causal = data.draw(st.integers(1, 22)), data.draw(st.integers(1, 4)), data.draw(st.booleans())
    queries, keys = torch.randint(0, 3, (2, 2, n, parts)), torch.randint(0, 3, (2, 2, m, parts))
    mask = torch.rand(2, m) > 0.3 if data.draw(st.booleans()) else None
    with use_backend(backend), pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "BYTES", {"cpu": data.draw(st.sampled_from([1, 2**18]))})
        found = agreeing_keys(queries, keys, 3, count, steps=steps, causal=causal, key_mask=mask)
    assert found.shape == (2, 2, n, min(count, m))
    rows = [sorted(j for j in row if j >= 0) for row in found.flatten(0, 2).tolist()]
    assert rows == [sorted(x) for x in by_sorting(queries, keys, count, steps, causal, mask)]


@settings(max_examples=25)
@given(st.data())
def test_sets_of_bits(data):
    m, count = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 9))
    x = torch.rand(3, m) > data.draw(st.floats(0, 1))
    sets = bit_sets.packed(x)
    number = torch.full((3,), count)
    assert bit_sets.members(sets, m).tolist() == [[j for j in range(m) if row[j]] + [-1] * (m - int(row.sum())) for row in x]
    assert bit_sets.sizes(sets).tolist() == x.sum(-1).tolist()
    assert torch.equal(bit_sets.firsts(sets, number), bit_sets.packed(x & (x.cumsum(-1) <= count)))
    assert torch.equal(bit_sets.prefixes(number.clamp(max=m), sets.shape[1])[0], bit_sets.packed(torch.arange(m) < count))


def test_refusals():
    codes = torch.zeros(1, 2, 4, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match="queries: expected int64"):
        agreeing_keys(codes.int(), codes, 2, 1)
    with pytest.raises(ValueError, match="keys: expected batch"):
        agreeing_keys(codes, codes[..., :2], 2, 1)
    with pytest.raises(ValueError, match="expected at least 1"):
        agreeing_keys(codes, codes, 2, 0)
    with pytest.raises(ValueError, match="key_mask: expected"):
        agreeing_keys(codes, codes, 2, 1, key_mask=torch.ones(1, 3, dtype=torch.bool))
