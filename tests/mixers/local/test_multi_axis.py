"""Blocks and lattices against loops over their cells, and what two layers see."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnlab
from attnlab import create_mixer
from attnlab.core.errors import UnsupportedError
from mixers.definition import assert_defined_by, build, tokens
from mixers.group_definition import in_groups


def definition(mixer, grid, part, p):
    def group(head, cell):
        strides = [-(-n // p) for n in grid]
        return tuple(c // p for c in cell) if part == "block" else tuple(c % s for c, s in zip(cell, strides, strict=True))

    def bias(head, query, key):
        steps = [1 if part == "block" else -(-n // p) for n in grid]
        offset = [(k - q) // s + p - 1 for q, k, s in zip(query, key, steps, strict=True)]
        return mixer.position.table[(head, *offset)]

    return in_groups(mixer, grid, group, None if mixer.position_name == "none" else bias)


def table(p, rank):
    options = {"size": p, "rank": rank, "direction": "key_minus_query"}
    return {"position": "offset_table", "position_options": options, "qkv_bias": True}


@pytest.mark.tier("T2", "mixer:multi_axis")
@pytest.mark.parametrize("part", ["block", "grid"])
@pytest.mark.parametrize(
    ("grid", "p", "bias"), [((4, 6), 2, True), ((5, 7), 3, True), ((2, 5), 4, True), ((2, 3, 4), 2, False)], ids=str
)
def test_equals_its_definition(grid, p, bias, part) -> None:
    mixer = build("multi_axis", 6, 2, part=part, window=p, **(table(p, len(grid)) if bias else {}))
    assert_defined_by(mixer, definition(mixer, grid, part, p), tokens(math.prod(grid), 6), grid=grid)


@settings(max_examples=12, deadline=None)
@given(st.tuples(st.integers(1, 7), st.integers(1, 7)), st.integers(2, 4), st.sampled_from(["block", "grid"]))
def test_any_sizes(grid, p, part) -> None:
    mixer = build("multi_axis", 4, 1, part=part, window=p, **table(p, 2))
    x = tokens(math.prod(grid), 4, 1)
    torch.testing.assert_close(mixer(x, grid=grid), definition(mixer, grid, part, p)(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("part", ["block", "grid"])
def test_a_window_of_the_whole_map_is_dense_attention(part) -> None:
    mixer, dense = build("multi_axis", part=part, window=5), build("softmax")
    dense.load_state_dict(mixer.state_dict())
    x = tokens(20)
    torch.testing.assert_close(mixer(x, grid=(4, 5)), dense(x))


def test_two_layers_see_everything_and_one_does_not() -> None:
    layers = [build("multi_axis", part=part, window=3) for part in ("block", "grid")]
    x = tokens(81, batch=1)

    def seen(layers) -> int:
        y = x
        for layer in layers:
            y = layer(y, grid=(9, 9))
        (gradient,) = torch.autograd.grad(y[0, 40].sum(), x)
        return int((gradient[0].abs().sum(-1) > 0).sum())

    assert [seen(layers[:1]), seen(layers[1:]), seen(layers)] == [9, 9, 81]


def test_blocks_keep_the_laws() -> None:
    attnlab.check("multi_axis", options={"part": "block", "window": 3}).raise_if_failed()


@pytest.mark.parametrize(
    ("options", "message"), [({"part": "both"}, "part: expected one of"), ({"window": 0}, "window: expected at least 1")]
)
def test_refusals(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("multi_axis", 8, 2, **options)
    with pytest.raises(UnsupportedError, match="rank 1"):
        create_mixer("multi_axis", 8, 2)(torch.randn(1, 9, 8))
