"""Overlapping windows against loops over queries and keys, and their borders."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnlab
from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens


def definition(mixer, grid, m, more, border, mask=None):
    """The card's equation, one query at a time; ``more`` cells longer are the sides of a window of keys."""

    def attend(x: Tensor) -> Tensor:
        q, k, v = (split_heads(p(x), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        cells = list(itertools.product(*(range(n) for n in grid)))
        heads = []
        for h in range(mixer.num_heads):
            rows = []
            for i, cell in enumerate(cells):
                first = [c // m * m - more // 2 for c in cell]
                logits, values = [], []
                for place in itertools.product(range(m + more), repeat=len(grid)):
                    key = tuple(f + p for f, p in zip(first, place, strict=True))
                    there = key in cells and (mask is None or bool(mask[cells.index(key)]))
                    if not there and border == "masked":
                        continue
                    j = cells.index(key) if there else 0
                    logit = (q[h][:, i] * k[h][:, j]).sum(-1) / math.sqrt(q[h].shape[-1]) * float(there)
                    if mixer.table is not None:
                        offset = tuple(p - c % m + m - 1 for p, c in zip(place, cell, strict=True))
                        logit = logit + mixer.table[(h, *offset)]
                    logits.append(logit)
                    values.append(v[h][:, j] * float(there))
                weights = torch.stack(logits, -1).softmax(-1)
                rows.append((weights.unsqueeze(-1) * torch.stack(values, 1)).sum(1))
            heads.append(torch.stack(rows, dim=1))
        y = mixer.out_proj(torch.cat(heads, dim=-1))
        return y if mask is None else y.masked_fill(~mask[:, None], 0.0)

    return attend


@pytest.mark.tier("T2", "mixer:overlapping_window")
@pytest.mark.parametrize("border", ["zero_keys", "masked"])
@pytest.mark.parametrize(
    ("grid", "window", "overlap", "bias"),
    [((7,), 3, 1.0, True), ((4, 6), 2, 0.5, True), ((3, 5), 2, 1.0, False), ((2, 3, 2), 2, 1, True), ((1, 4), 3, 0.5, True)],
    ids=str,
)
def test_equals_its_definition(grid, window, overlap, bias, border) -> None:
    more = int(overlap * window)
    mixer = build(
        "overlapping_window",
        6,
        2,
        window=window,
        overlap=overlap,
        relative_bias=bias,
        rank=len(grid),
        border=border,
        qkv_bias=True,
    )
    x = tokens(math.prod(grid), 6)
    assert_defined_by(mixer, definition(mixer, grid, window, more, border), x, grid=grid)
    mask = torch.ones(x.shape[1], dtype=torch.bool)
    mask[1] = False
    masked = definition(mixer, grid, window, more, border, mask)
    assert_defined_by(mixer, lambda y: masked(y.masked_fill(~mask[:, None], 0.0)), x, grid=grid, mask=mask.expand(2, -1))


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_sizes(data) -> None:
    rank = data.draw(st.integers(1, 3))
    grid = data.draw(st.tuples(*[st.integers(1, {1: 17, 2: 5, 3: 3}[rank])] * rank))
    window = data.draw(st.integers(1, {1: 5, 2: 3, 3: 2}[rank]))
    overlap = data.draw(st.sampled_from([0, 0.5, 1.0]))
    border = data.draw(st.sampled_from(["zero_keys", "masked"]))
    mixer = build("overlapping_window", 4, 1, window=window, overlap=overlap, border=border)
    x = tokens(math.prod(grid), 4, 1)
    torch.testing.assert_close(
        mixer(x, grid=grid), definition(mixer, grid, window, int(overlap * window), border)(x), rtol=1e-9, atol=1e-12
    )


def test_one_window_is_dense_attention() -> None:
    local, dense = build("overlapping_window", window=9, border="masked"), build("softmax")
    dense.load_state_dict(local.state_dict())
    x = tokens(9)
    torch.testing.assert_close(local(x), dense(x))


def test_without_overlap_it_is_window_attention() -> None:
    mixer, window = build("overlapping_window", window=3, overlap=0, border="masked"), build("window", window=3)
    window.load_state_dict(mixer.state_dict())
    x = tokens(20)
    torch.testing.assert_close(mixer(x, grid=(4, 5)), window(x, grid=(4, 5)))


def test_keeps_the_laws_with_a_bias() -> None:
    options = {"window": 2, "relative_bias": True, "rank": 2, "qkv_bias": True}
    attnlab.check("overlapping_window", options=options).raise_if_failed()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: expected at least 1"),
        ({"overlap": -0.5}, "overlap: expected 0 or more"),
        ({"relative_bias": True}, "rank: expected 1, 2 or 3"),
        ({"border": "wrap"}, "border: expected one of"),
        ({"position": "alibi"}, "position: expected 'none' or 'rotary'"),
    ],
)
def test_refusals(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("overlapping_window", 8, 2, **options)
