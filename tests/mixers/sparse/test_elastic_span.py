"""Elastic spans against their definition, their rules, limits and stream."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import create_mixer
from attnlab.core.errors import UnsupportedError
from attnlab.mixers.sparse.elastic_span import elastic_blocks
from mixers.definition import assert_defined_by, build, tokens
from mixers.pattern_definition import over_keys

RULES = {"alpha": (-4, 0, 6), "beta": (0.0, 0.5, 0.1), "block": 2, "length": 12}


@pytest.mark.tier("T2", "mixer:elastic_span")
@pytest.mark.parametrize("unit", ["token", "block"])
def test_equals_its_definition(unit) -> None:
    mixer = build("elastic_span", unit=unit, **RULES)
    assert mixer.spans == (1, 3, 3)

    def keys(h: int, i: int, n: int) -> list[int]:
        w, b = max(1, int(RULES["alpha"][h] // 2 + RULES["beta"][h] * 12 / 2)), 2
        near = (lambda j: j > i - w * b) if unit == "token" else (lambda j: j // b > i // b - w)
        return [j for j in range(i + 1) if j < b or near(j)]

    assert_defined_by(mixer, over_keys(mixer, keys), tokens(13))


def test_rules_are_cut_to_whole_blocks() -> None:
    assert elastic_blocks(100, 0.0, 64, 4096) == 1
    assert elastic_blocks(-1, 0.5, 64, 4096) == 31  # -1 // 64 is -1
    assert elastic_blocks(0, 0.7, 64, 1000) == 10
    assert elastic_blocks(-2048, 0.0, 64, 4096) == 1


@pytest.mark.parametrize("unit", ["token", "block"])
def test_long_spans_are_dense_attention(unit) -> None:
    mixer = build("elastic_span", alpha=(16, 20, 40), beta=1, block=3, unit=unit)
    dense = build("softmax", causal=True)
    dense.load_state_dict(mixer.state_dict())
    x = tokens(13)
    torch.testing.assert_close(mixer(x), dense(x))


def test_a_longer_text_has_longer_spans() -> None:
    mixer = build("elastic_span", alpha=2, beta=(0, 0.5, 1), block=2, length=4)
    assert mixer.spans == (1, 2, 3)
    mixer.length = 8
    assert mixer.spans == (1, 3, 5)


@settings(max_examples=15)
@given(st.data())
def test_any_split_and_mask(data) -> None:
    block, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    alpha = tuple(data.draw(st.integers(-3, 12)) for _ in range(2))
    mixer = build("elastic_span", 8, 4, alpha=alpha, beta=0.1, block=block, length=30, num_kv_heads=2, position="rotary")
    x = torch.randn(2, n, 8, dtype=torch.float64)
    mask = torch.rand(2, n) > 0.4 if data.draw(st.booleans()) else None
    state, outputs, start = mixer.init_state(2), [], 0
    while start < n:
        part = slice(start, start + data.draw(st.integers(1, n - start)))
        y, state = mixer.extend(x[:, part], state, mask=None if mask is None else mask[:, part])
        outputs.append(y)
        start = part.stop
        for number, span in enumerate(mixer.groups):
            assert state[f"k{number}"].shape[2] <= (span + 1) * block - 1
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x, mask=mask))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="alpha: expected one number, or 2"):
        create_mixer("elastic_span", 8, 2, alpha=(1, 2, 3))
    with pytest.raises(ValueError, match="unit: expected 'token' or 'block'"):
        create_mixer("elastic_span", 8, 2, unit="page")
    with pytest.raises(ValueError, match="block: expected at least 1"):
        create_mixer("elastic_span", 8, 2, block=0)
    with pytest.raises(UnsupportedError, match="causal=False"):
        create_mixer("elastic_span", 8, 2, causal=False)
    with pytest.raises(UnsupportedError, match="streaming"):
        create_mixer("elastic_span", 8, 2, unit="block").init_state(1)
