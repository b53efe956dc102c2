"""Strided, fixed and dilated patterns against their definitions, and their limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import check, create_mixer
from mixers.definition import assert_defined_by, build, tokens
from mixers.pattern_definition import over_keys

PATTERNS = ("strided", "fixed", "dilated")


def rule(pattern: str, stride: int, summary: int, window: int, causal: bool):
    def keys(h: int, i: int, n: int) -> list[int]:
        def used(j: int) -> bool:
            if pattern == "strided":
                return abs(i - j) < stride or (i - j) % stride == 0
            if pattern == "fixed":
                return i // stride == j // stride or j % stride >= stride - summary
            steps, rest = divmod(abs(i - j), stride)
            return rest == 0 and (steps < window if causal else steps <= window // 2)

        return [j for j in range(n) if used(j) and (j <= i or not causal)]

    return keys


CASES = [("strided", 3, 1, 1), ("strided", 1, 1, 1), ("fixed", 4, 2, 1), ("fixed", 3, 3, 1), ("dilated", 2, 1, 3)]


@pytest.mark.tier("T2", "mixer:strided_sparse")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("pattern", "stride", "summary", "window"), CASES)
def test_equals_its_definition(pattern, stride, summary, window, causal) -> None:
    mixer = build("strided_sparse", pattern=pattern, stride=stride, num_summary=summary, window=window, causal=causal)
    assert_defined_by(mixer, over_keys(mixer, rule(pattern, stride, summary, window, causal)), tokens(11))


@settings(max_examples=20)
@given(st.data())
def test_weights_stand_where_the_rule_says(data) -> None:
    n, stride = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 20))
    summary, window = data.draw(st.integers(1, stride)), data.draw(st.integers(1, 9))
    pattern, causal = data.draw(st.sampled_from(PATTERNS)), data.draw(st.booleans())
    options = {"pattern": pattern, "stride": stride, "num_summary": summary, "window": window, "causal": causal}
    mixer = build("strided_sparse", 4, 2, num_kv_heads=1, **options)
    found = mixer.mixing_matrix(torch.randn(1, n, 4, dtype=torch.float64))[0, 0] > 0
    keys = rule(pattern, stride, summary, window, causal)
    expected = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        expected[i, keys(0, i, n)] = True
    assert torch.equal(found, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_stride_of_all_tokens_is_dense_attention(pattern, causal) -> None:
    options = {"stride": 1, "window": 20} if pattern == "dilated" else {"stride": 10}
    mixer, dense = build("strided_sparse", pattern=pattern, causal=causal, **options), build("softmax", causal=causal)
    dense.load_state_dict(mixer.state_dict())
    x = tokens(10)
    torch.testing.assert_close(mixer(x), dense(x))


@pytest.mark.parametrize("pattern", ["fixed", "dilated"])
def test_every_pattern_keeps_the_laws(pattern) -> None:
    options = {"pattern": pattern, "stride": 3, "window": 3}
    check("strided_sparse", options=options, only=["padding_right*", "padding_inside", "causality_gradient"]).raise_if_failed()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="pattern: expected one of"):
        create_mixer("strided_sparse", 8, 2, pattern="star")
    with pytest.raises(ValueError, match="stride: expected at least 1"):
        create_mixer("strided_sparse", 8, 2, stride=0)
    with pytest.raises(ValueError, match="num_summary: expected 1 to stride"):
        create_mixer("strided_sparse", 8, 2, stride=3, num_summary=4)
    with pytest.raises(ValueError, match="position: expected 'none' or 'rotary'"):
        create_mixer("strided_sparse", 8, 2, position="alibi")
