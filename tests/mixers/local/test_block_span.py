"""Blocked local attention against its definition, its limits and its stream."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import create_mixer
from attnlab.core.errors import UnsupportedError
from mixers.definition import assert_defined_by, build, tokens
from mixers.pattern_definition import over_keys


@pytest.mark.tier("T2", "mixer:block_span")
@pytest.mark.parametrize(("b", "p", "n"), [(3, 1, 11), (4, 0, 9), (2, 3, 13), (1, 1, 5), (7, 1, 3)])
def test_equals_its_definition(b, p, n) -> None:
    mixer = build("block_span", block=b, num_previous=p)

    def keys(h: int, i: int, n: int) -> list[int]:
        return [j for j in range(i + 1) if j // b >= i // b - p]

    assert_defined_by(mixer, over_keys(mixer, keys), tokens(n))


def test_one_block_is_dense_attention() -> None:
    mixer, dense = build("block_span", block=13), build("softmax", causal=True)
    dense.load_state_dict(mixer.state_dict())
    x = tokens(13)
    torch.testing.assert_close(mixer(x), dense(x))


@settings(max_examples=15)
@given(st.data())
def test_any_split_and_mask(data) -> None:
    b, p, n = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 3)), data.draw(st.integers(1, 40))
    position = data.draw(st.sampled_from(["none", "rotary"]))
    mixer = build("block_span", 8, 4, block=b, num_previous=p, num_kv_heads=2, position=position)
    x = torch.randn(2, n, 8, dtype=torch.float64)
    mask = torch.rand(2, n) > 0.4 if data.draw(st.booleans()) else None
    state, outputs, start = mixer.init_state(2), [], 0
    while start < n:
        part = slice(start, start + data.draw(st.integers(1, n - start)))
        y, state = mixer.extend(x[:, part], state, mask=None if mask is None else mask[:, part])
        outputs.append(y)
        start = part.stop
        assert state["k"].shape[2] < (p + 1) * b
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x, mask=mask))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="block: expected at least 1"):
        create_mixer("block_span", 8, 2, block=0)
    with pytest.raises(ValueError, match="num_previous: expected at least 0"):
        create_mixer("block_span", 8, 2, num_previous=-1)
    with pytest.raises(ValueError, match="position: expected 'none' or 'rotary'"):
        create_mixer("block_span", 8, 2, position="alibi")
    with pytest.raises(UnsupportedError, match="causal=False"):
        create_mixer("block_span", 8, 2, causal=False)
