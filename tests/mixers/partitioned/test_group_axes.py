"""Attention along one axis token by token, as dense attention with masks of blocks, and its limits."""

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
from mixers.definition import assert_defined_by, build, split_heads, tokens


def definition(mixer, grid: tuple[int, ...]):
    cells = list(itertools.product(*(range(side) for side in grid)))
    axis = mixer.axis % len(grid)

    def attend(x: Tensor) -> Tensor:
        q, k, v = (split_heads(p(x), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        heads = []
        for h in range(mixer.num_heads):
            rows = []
            for i, cell in enumerate(cells):
                along = [(*cell[:axis], place, *cell[axis + 1 :]) for place in range(grid[axis])]
                keys = [cells.index(other) for other in along]
                logits = torch.einsum("bd,bmd->bm", q[h][:, i], k[h][:, keys]) / math.sqrt(q[h].shape[-1])
                rows.append(torch.einsum("bm,bmd->bd", logits.softmax(-1), v[h][:, keys]))
            heads.append(torch.stack(rows, dim=1))
        return mixer.out_proj(torch.cat(heads, dim=-1))

    return attend


@pytest.mark.tier("T2", "mixer:group_axes")
@pytest.mark.parametrize(
    ("grid", "axis"), [((1, 7), 1), ((3, 4), -1), ((3, 4), 0), ((2, 3, 3), 1), ((2, 3, 3), -3), ((1, 5), 0)], ids=str
)
def test_equals_its_definition(grid, axis) -> None:
    mixer = build("group_axes", axis=axis)
    assert_defined_by(mixer, definition(mixer, grid), tokens(math.prod(grid)), grid=grid)


@given(st.data())
def test_equals_dense_attention_with_a_mask_of_blocks(data) -> None:
    grid = tuple(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=3)))
    axis = data.draw(st.integers(-len(grid), len(grid) - 1))
    mixer, dense = build("group_axes", axis=axis), build("softmax")
    dense.load_state_dict(mixer.state_dict())
    cells = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, len(grid))
    differ = cells[:, None] != cells[None]
    differ[..., axis] = False
    x = tokens(len(cells))
    torch.testing.assert_close(mixer(x, grid=grid), dense(x, pair_mask=~differ.any(-1)[None, None]), rtol=1e-9, atol=1e-11)


def test_a_bias_of_the_axis() -> None:
    mixer, dense = (build(name, position="alibi") for name in ("group_axes", "softmax"))
    dense.load_state_dict(mixer.state_dict())
    x = tokens(12)
    rows = dense(x.unflatten(1, (3, 4)).flatten(0, 1)).unflatten(0, (2, 3)).flatten(1, 2)
    torch.testing.assert_close(mixer(x, grid=(3, 4)), rows)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="axis: expected -3 to 2"):
        create_mixer("group_axes", 8, 2, axis=3)
    with pytest.raises(ValueError, match="position: expected 'none' or a bias"):
        create_mixer("group_axes", 8, 2, position="rotary")
    with pytest.raises(UnsupportedError, match="rank 1"):
        create_mixer("group_axes", 8, 2)(torch.randn(1, 6, 8))
    with pytest.raises(UnsupportedError, match="rank 2"):
        create_mixer("group_axes", 8, 2, axis=2)(torch.randn(1, 6, 8), grid=(2, 3))
