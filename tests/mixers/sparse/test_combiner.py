"""Combiner against its distribution written out pair by pair, its spans, its limits and its laws for every pattern."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import check, create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens

PATTERNS = ("fixed", "axial", "mixture", "logsparse")


def pool(x: Tensor, activation: str, reduction: str) -> Tensor:
    """(b, y, d) to (b, d)."""
    x = x.relu() if activation == "relu" else x
    return {"max": lambda: x.amax(1), "mean": lambda: x.mean(1), "sum": lambda: x.sum(1)}[reduction]()


class Spans:
    """The keys and values that one query of one head uses; tokens are (b, d), scale is in the queries."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, i: int) -> None:
        self.q, self.k, self.v, self.i = q, k, v, i
        self.keys, self.values = [], []

    def token(self, j: int) -> None:
        self.keys.append(self.k[:, j])
        self.values.append(self.v[:, j])

    def span(self, query: Tensor, key: Tensor, members: list[int]) -> None:
        weights = torch.einsum("bd,bjd->bj", query, self.k[:, members]).softmax(-1)
        self.keys.append(key)
        self.values.append(torch.einsum("bj,bjd->bd", weights, self.v[:, members]))

    def sums(self, members: list[int], line: list[int], leak: bool) -> None:
        if members:
            self.span(self.q[:, members].sum(1), self.k[:, members].sum(1), members)
        elif leak and line:
            self.keys.append(torch.zeros_like(self.k[:, 0]))
            self.values.append(self.v[:, line].mean(1))

    def output(self) -> Tensor:
        logits = torch.einsum("bd,bjd->bj", self.q[:, self.i], torch.stack(self.keys, 1))
        return torch.einsum("bj,bjd->bd", logits.softmax(-1), torch.stack(self.values, 1))


def fixed(s: Spans, n: int, size: int, causal: bool, how) -> None:
    own = s.i // size
    for j in range(own * size, min(n, own * size + size)):
        if not causal or j <= s.i:
            s.token(j)
    for r in range(-(-n // size)):
        if not causal or r < own:
            members = list(range(r * size, min(n, r * size + size)))
            s.span(pool(s.q[:, members], *how[:2]), pool(s.k[:, members], *how[:2]), members)


def axial(s: Spans, n: int, size: int, causal: bool, how) -> None:
    own, column = divmod(s.i, size)
    for j in range(own * size, min(n, own * size + size)):
        if not causal or j <= s.i:
            s.token(j)
    for r in range(-(-n // size)):
        j = r * size + column
        if j < n and (not causal or r < own):
            members = list(range(r * size, min(n, r * size + size)))
            key = s.k[:, j]
            if how[2] == "wsum":
                weights = torch.einsum("bd,bjd->bj", s.q[:, j], s.k[:, members]).softmax(-1)
                key = torch.einsum("bj,bjd->bd", weights, s.k[:, members])
            s.span(s.q[:, j], key, members)


def mixture(s: Spans, n: int, size: int, causal: bool, how) -> None:
    own, column = divmod(s.i, size)
    rows = -(-n // size)

    def cells(row_range, column_range):
        return [r * size + c for r in row_range for c in column_range if r * size + c < n]

    for j in cells([own], range(size)):
        if not causal or j <= s.i:
            s.token(j)
    for j in cells(range(own if causal else rows), [column]):
        s.token(j)
    for c in range(size):
        line = cells(range(rows), [c])
        if causal and c != column:
            s.sums(cells(range(own), [c]), line, False)
        if not causal:
            s.sums(cells(range(own), [c]), line, True)
            s.sums(cells(range(own + 1, rows), [c]), line, True)
    for r in range(own if causal else rows):
        line = cells([r], range(size))
        s.sums(cells([r], range(column)), line, not causal)
        s.sums(cells([r], range(column + 1, size)), line, not causal)


def logsparse(s: Spans, n: int, size: int, causal: bool, how) -> None:
    s.token(s.i)
    width = 1
    while width < n:
        start = (s.i // width ^ 1) * width
        members = [j for j in range(start, start + width) if j < n]
        if members and (not causal or start < s.i):
            if width == 1:
                s.token(start)
            else:
                s.span(pool(s.q[:, members], *how[:2]), pool(s.k[:, members], *how[:2]), members)
        width *= 2


RULES = {"fixed": fixed, "axial": axial, "mixture": mixture, "logsparse": logsparse}


def definition(mixer, size: int):
    how = (mixer.activation, mixer.reduction, mixer.row_summary)

    def attend(x: Tensor) -> Tensor:
        n, heads = x.shape[1], []
        projected = [split_heads(p(x), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
        for q, k, v in zip(*projected, strict=True):
            rows = []
            for i in range(n):
                spans = Spans(q / math.sqrt(mixer.head_dim), k, v, i)
                RULES[mixer.pattern](spans, n, size, mixer.causal, how)
                rows.append(spans.output())
            heads.append(torch.stack(rows, 1))
        return mixer.out_proj(torch.cat(heads, -1))

    return attend


CASES = [(p, {}) for p in PATTERNS] + [
    ("fixed", {"activation": "relu", "reduction": "max"}),
    ("fixed", {"reduction": "mean"}),
    ("logsparse", {"activation": "relu", "reduction": "sum"}),
    ("axial", {"row_summary": "wsum"}),
]


@pytest.mark.tier("T2", "mixer:combiner")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("pattern", "options"), CASES, ids=str)
def test_equals_its_definition(pattern, options, causal) -> None:
    mixer = build("combiner", 6, 2, pattern=pattern, segment=3, causal=causal, qkv_bias=True, **options)
    assert_defined_by(mixer, definition(mixer, 3), tokens(11, 6))


@settings(max_examples=20)
@given(st.data())
def test_weights_are_a_distribution_with_full_support(data) -> None:
    pattern, causal = data.draw(st.sampled_from(PATTERNS)), data.draw(st.booleans())
    n, segment = data.draw(st.integers(1, 19)), data.draw(st.integers(1, 8))
    mixer = build("combiner", 8, 4, pattern=pattern, segment=segment, causal=causal, num_kv_heads=2)
    mask = torch.rand(2, n) > 0.3 if data.draw(st.booleans()) else None
    weights = mixer.mixing_matrix(torch.randn(2, n, 8, dtype=torch.float64), mask=mask)
    real = torch.ones(2, n, dtype=torch.bool) if mask is None else mask
    allowed = real[:, None, :, None] & real[:, None, None, :] & (torch.ones(n, n).tril() > 0 if causal else torch.tensor(True))
    torch.testing.assert_close(weights.sum(-1), real[:, None].expand(weights.shape[:3]).double())
    assert bool((weights[~allowed.expand_as(weights)] == 0).all())
    if mask is None and (pattern != "axial" or causal or n % segment == 0):
        assert bool((weights[allowed.expand_as(weights)] > 0).all())


@pytest.mark.parametrize("pattern", ["fixed", "axial", "mixture"])
def test_one_causal_row_is_dense_attention(pattern) -> None:
    mixer, dense = build("combiner", pattern=pattern, segment=9, causal=True), build("softmax", causal=True)
    dense.load_state_dict(mixer.state_dict())
    x = tokens(9)
    torch.testing.assert_close(mixer(x), dense(x))


@pytest.mark.parametrize("pattern", ["axial", "mixture", "logsparse"])
def test_every_pattern_keeps_the_laws(pattern) -> None:
    only = ["padding_right*", "padding_inside", "causality_gradient"]
    check("combiner", options={"pattern": pattern, "segment": 3}, only=only).raise_if_failed()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="pattern: expected one of"):
        create_mixer("combiner", 8, 2, pattern="star")
    with pytest.raises(ValueError, match="segment: expected at least 1"):
        create_mixer("combiner", 8, 2, segment=0)
    with pytest.raises(ValueError, match="position: expected 'none' or 'rotary'"):
        create_mixer("combiner", 8, 2, position="alibi")
