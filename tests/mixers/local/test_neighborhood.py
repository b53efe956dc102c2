"""Neighbourhood attention against its rules written out cell by cell, and its limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer
from attnlab.core.errors import UnsupportedError
from attnlab.mixers.local.neighborhood import receptive_field
from attnlab.ops.tile_attention.neighborhood import axes_of, neighborhood_attention
from mixers.definition import assert_defined_by, build, split_heads, tokens
from ops.oracle import assert_equal_in_float64


def visible(i: int, size: int, w: int, s: int, t: int, causal: bool) -> list[int]:
    """The cells of one axis that cell i sees, by the card's rule."""
    group = [j for j in range(size) if j % t == i % t]
    place, last = i // t, len(group) - 1
    if causal:
        leader = min(place // s * s + s - 1, last)
        return [group[p] for p in range(len(group)) if leader - p < w and p <= place]
    leader = min(place // s * s + s // 2, last)
    left, right = w // 2, w // 2 - 1 + w % 2
    center = min(max(leader, left), last - right)
    return [group[p] for p in range(center - left, center + right + 1)]


def definition(mixer, grid, w, s, t, causal):
    def attend(x: Tensor) -> Tensor:
        q, k, v = (split_heads(p(x), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        cells = list(itertools.product(*(range(n) for n in grid)))
        number = {cell: i for i, cell in enumerate(cells)}
        heads = []
        for h in range(mixer.num_heads):
            rows = []
            for i, cell in enumerate(cells):
                along = [visible(c, n, w[a], s[a], t[a], causal[a]) for a, (c, n) in enumerate(zip(cell, grid, strict=True))]
                keys = list(itertools.product(*along))
                index = [number[key] for key in keys]
                logits = torch.einsum("bd,bmd->bm", q[h][:, i], k[h][:, index]) / math.sqrt(q[h].shape[-1])
                if mixer.table is not None:
                    offsets = [tuple((key[a] - cell[a]) // t[a] + w[a] - 1 for a in range(len(grid))) for key in keys]
                    logits = logits + torch.stack([mixer.table[(h, *offset)] for offset in offsets])
                rows.append(torch.einsum("bm,bmd->bd", logits.softmax(-1), v[h][:, index]))
            heads.append(torch.stack(rows, dim=1))
        return mixer.out_proj(torch.cat(heads, dim=-1))

    return attend


CASES = [
    ((11,), (4,), (1,), (1,), (False,)),
    ((13,), (5,), (3,), (2,), (False,)),
    ((12,), (5,), (2,), (2,), (True,)),
    ((5, 6), (3, 4), (1, 2), (1, 1), (False, False)),
    ((6, 7), (3, 2), (1, 1), (2, 3), (True, False)),
    ((3, 4, 5), (2, 3, 3), (1, 2, 1), (1, 1, 1), (True, False, False)),
]


@pytest.mark.tier("T2", "mixer:neighborhood")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("grid", "w", "s", "t", "causal"), CASES, ids=str)
def test_equals_its_definition(grid, w, s, t, causal, bias) -> None:
    mixer = build("neighborhood", 6, 2, window=w, stride=s, dilation=t, causal_axes=causal, relative_bias=bias)
    x = tokens(math.prod(grid), 6)
    assert_defined_by(mixer, definition(mixer, grid, w, s, t, causal), x, grid=grid)


@given(st.data())
def test_tiles_equal_the_mask_for_any_sizes(data) -> None:
    rank = data.draw(st.integers(1, 3))
    limit = {1: 90, 2: 13, 3: 6}[rank]
    grid = data.draw(st.tuples(*[st.integers(1, limit)] * rank))
    dilation = tuple(data.draw(st.integers(1, min(3, n))) for n in grid)
    window = tuple(data.draw(st.integers(1, n // t)) for n, t in zip(grid, dilation, strict=True))
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    causal = tuple(data.draw(st.booleans()) for _ in grid)
    n = math.prod(grid)
    inputs = [torch.randn(1, h, n, 2) for h in (2, 1, 1)]
    mask = torch.rand(1, n) > 0.3 if data.draw(st.booleans()) else None
    rules = {"grid": grid, "window": window, "stride": stride, "dilation": dilation, "causal": causal, "key_mask": mask}
    assert_equal_in_float64(
        lambda *x: neighborhood_attention(*x, **rules).output,
        lambda *x: neighborhood_attention(*x, backend="reference", **rules).output,
        *inputs,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_of_the_whole_grid_is_dense_attention(causal) -> None:
    local, dense = build("neighborhood", window=9, causal=causal), build("softmax", causal=causal)
    dense.load_state_dict(local.state_dict())
    x = tokens(9)
    torch.testing.assert_close(local(x), dense(x))


def test_extra_keys_are_in_the_same_softmax() -> None:
    q, k, v = (torch.randn(1, 2, 7, 3, dtype=torch.float64) for _ in range(3))
    more_k, more_v = (torch.randn(1, 2, 2, 3, dtype=torch.float64) for _ in range(2))
    seen = neighborhood_attention(q, k, v, grid=(7,), window=7, extra_k=more_k, extra_v=more_v).output
    keys, values = torch.cat((k, more_k), 2), torch.cat((v, more_v), 2)
    torch.testing.assert_close(seen, torch.nn.functional.scaled_dot_product_attention(q, keys, values))


@pytest.mark.parametrize("short_axes", ["shrunk", "zero_tokens"])
def test_a_grid_smaller_than_the_window(short_axes) -> None:
    mixer = build("neighborhood", window=5, dilation=2, relative_bias=True, rank=2, short_axes=short_axes)
    for grid in ((1, 1), (1, 9), (4, 3)):
        x = tokens(math.prod(grid))
        assert mixer(x, grid=grid).isfinite().all()
    full = build("neighborhood", window=(1, 3), dilation=(1, 1), rank=2)
    small = build("neighborhood", window=(7, 3), dilation=(1, 1), rank=2)
    small.load_state_dict(full.state_dict())
    x = tokens(8)
    torch.testing.assert_close(small(x, grid=(1, 8)), full(x, grid=(1, 8)))


def test_the_receptive_field_grows_with_dilated_layers() -> None:
    near = axes_of((32, 32), 3)
    far = axes_of((32, 32), 3, dilation=8)
    assert receptive_field([near, near]) == 5**2
    assert receptive_field([near, far]) == 9**2


def test_refusals() -> None:
    with pytest.raises(ValueError, match="stride: expected 1 to the window"):
        create_mixer("neighborhood", 8, 2, window=3, stride=4)
    with pytest.raises(ValueError, match="rank: expected the rank of the grid"):
        create_mixer("neighborhood", 8, 2, relative_bias=True)
    with pytest.raises(ValueError, match="short_axes: expected one of"):
        create_mixer("neighborhood", 8, 2, short_axes="cut")
    with pytest.raises(ValueError, match="position: expected 'none' or 'rotary'"):
        create_mixer("neighborhood", 8, 2, position="alibi")
    with pytest.raises(ValueError, match="rank: expected one of 1, 2, 3"):
        create_mixer("neighborhood", 8, 2, window=(3, 3), rank=3)
    with pytest.raises(ValueError, match=r"window: expected window \* dilation of at most"):
        create_mixer("neighborhood", 8, 2, window=5, short_axes="refused")(torch.randn(1, 4, 8))
    with pytest.raises(UnsupportedError, match="rank 1"):
        create_mixer("neighborhood", 8, 2, window=(3, 3))(torch.randn(1, 9, 8))
