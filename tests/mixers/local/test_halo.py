"""Blocks with a halo against loops over queries and keys, down-sampling, borders."""

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
from mixers.group_definition import cells_of


def definition(mixer, grid, b, h, *, stride=1, mask=None):
    """The card's equation, one query at a time."""

    def attend(x: Tensor) -> Tensor:
        q, k, v = (split_heads(p(x), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        cells, w = cells_of(grid), b + 2 * h
        asked = [cell for cell in cells if all(c % stride == 0 for c in cell)]
        heads = []
        for head in range(mixer.num_heads):
            rows, scale = [], 1 / math.sqrt(q[head].shape[-1])
            for cell in asked:
                query = q[head][:, cells.index(cell)]
                logits, values = [], []
                for place in itertools.product(range(w), repeat=len(grid)):
                    key = tuple(c // b * b - h + p for c, p in zip(cell, place, strict=True))
                    there = key in cells and (mask is None or bool(mask[cells.index(key)]))
                    if not there and mixer.border == "masked":
                        continue
                    j = cells.index(key) if there else 0
                    logit = scale * (query * k[head][:, j]).sum(-1) * float(there)
                    for table, p, c in zip(mixer.tables or (), place, cell, strict=False):
                        vector = table[p - c % b // stride + w - 1]
                        logit = logit + query @ vector * (scale if mixer.scaled_logits else 1)
                    logits.append(logit)
                    values.append(v[head][:, j] * float(there))
                weights = torch.stack(logits, -1).softmax(-1)
                rows.append((weights.unsqueeze(-1) * torch.stack(values, 1)).sum(1))
            heads.append(torch.stack(rows, dim=1))
        y = mixer.out_proj(torch.cat(heads, dim=-1))
        real = None if mask is None else mask[[cells.index(cell) for cell in asked]]
        return y if real is None else y.masked_fill(~real[:, None], 0.0)

    return attend


CASES = [
    ((7,), 3, 1, True, "zero_keys"),
    ((4, 6), 2, 1, True, "zero_keys"),
    ((3, 5), 2, 1, True, "masked"),
    ((1, 4), 3, 2, True, "zero_keys"),
    ((2, 3, 2), 2, 1, True, "zero_keys"),
    ((5, 3), 2, 0, False, "masked"),
]


@pytest.mark.tier("T2", "mixer:halo")
@pytest.mark.parametrize(("grid", "b", "h", "relative", "border"), CASES, ids=str)
def test_equals_its_definition(grid, b, h, relative, border) -> None:
    options = {"relative_logits": relative, "rank": len(grid), "border": border, "scaled_logits": len(grid) == 1}
    mixer = build("halo", 6, 2, block=b, halo=h, qkv_bias=True, **options)
    x = tokens(math.prod(grid), 6)
    assert_defined_by(mixer, definition(mixer, grid, b, h), x, grid=grid)
    mask = torch.ones(x.shape[1], dtype=torch.bool)
    mask[1] = False
    masked = definition(mixer, grid, b, h, mask=mask)
    assert_defined_by(mixer, lambda y: masked(y.masked_fill(~mask[:, None], 0.0)), x, grid=grid, mask=mask.expand(2, -1))


@pytest.mark.tier("T2", "mixer:halo")
@pytest.mark.parametrize(("grid", "b", "h", "stride"), [((4, 4), 2, 1, 2), ((7, 5), 4, 1, 2), ((11,), 6, 2, 3)], ids=str)
def test_downsampling_equals_its_definition(grid, b, h, stride) -> None:
    mixer = build("halo", 6, 2, block=b, halo=h, relative_logits=True, rank=len(grid))
    x = tokens(math.prod(grid), 6)
    mask = torch.ones(x.shape[1], dtype=torch.bool)
    mask[-1] = mask[0] = False
    for given_mask in (None, mask):
        clean = x if given_mask is None else x.masked_fill(~mask[:, None], 0.0)
        expected = definition(mixer, grid, b, h, stride=stride, mask=given_mask)(clean)
        shared = None if given_mask is None else mask.expand(2, -1)
        found = mixer.downsample(x, stride=stride, mask=shared, grid=grid)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        direction = torch.randn(found.shape, dtype=torch.float64)
        ours, theirs = (torch.autograd.grad((y * direction).sum(), x)[0] for y in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_sizes(data) -> None:
    rank = data.draw(st.integers(1, 3))
    grid = data.draw(st.tuples(*[st.integers(1, {1: 13, 2: 5, 3: 3}[rank])] * rank))
    b, h = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2 if rank < 3 else 1))
    border = data.draw(st.sampled_from(["zero_keys", "masked"]))
    mixer = build("halo", 4, 1, block=b, halo=h, relative_logits=True, rank=rank, border=border)
    x = tokens(math.prod(grid), 4, 1)
    torch.testing.assert_close(mixer(x, grid=grid), definition(mixer, grid, b, h)(x), rtol=1e-9, atol=1e-12)


def test_one_block_is_dense_attention() -> None:
    mixer, dense = build("halo", block=5, halo=2, border="masked"), build("softmax")
    dense.load_state_dict(mixer.state_dict())
    x = tokens(20)
    torch.testing.assert_close(mixer(x, grid=(4, 5)), dense(x))


def test_without_a_halo_it_is_window_attention() -> None:
    mixer, window = build("halo", block=3, halo=0, border="masked"), build("window", window=3)
    window.load_state_dict(mixer.state_dict())
    x = tokens(20)
    torch.testing.assert_close(mixer(x, grid=(4, 5)), window(x, grid=(4, 5)))


@pytest.mark.parametrize("border", ["zero_keys", "masked"])
def test_keeps_the_laws_with_relative_logits(border) -> None:
    options = {"block": 2, "relative_logits": True, "rank": 1, "qkv_bias": True, "border": border}
    attnlab.check("halo", options=options).raise_if_failed()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block: expected at least 1"),
        ({"halo": -1}, "halo: expected 0 or more"),
        ({"relative_logits": True}, "rank: expected 1, 2 or 3"),
        ({"border": "wrap"}, "border: expected one of"),
        ({"position": "alibi"}, "position: expected 'none' or 'rotary'"),
    ],
)
def test_refusals(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("halo", 8, 2, **options)


def test_a_stride_divides_the_block() -> None:
    with pytest.raises(ValueError, match="stride: expected a divisor of block=4"):
        create_mixer("halo", 8, 2, block=4).downsample(torch.randn(1, 9, 8), stride=3)
