"""Long-range grouping token by token, and what reaches what."""

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
    views = (1, *grid) if len(grid) == 2 else grid
    cells = list(itertools.product(*(range(side) for side in views)))
    number = {cell: i for i, cell in enumerate(cells)}

    def around(v: Tensor, cell: tuple[int, int, int]) -> Tensor:
        """The signature of one cell, all heads."""
        if mixer.signature is None:
            return torch.zeros_like(v[:, 0])
        view, row, column = cell
        total = mixer.signature.bias
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            other = (view, row + dy, column + dx)
            if other in number:
                total = total + mixer.signature.weight[:, 0, dy + 1, dx + 1] * v[:, number[other]]
        return total

    def attend(x: Tensor) -> Tensor:
        values = mixer.v_proj(x)
        q, k, v = (split_heads(t, mixer.num_heads) for t in (mixer.q_proj(x), mixer.k_proj(x), values))
        heads = []
        for h in range(mixer.num_heads):
            rows = []
            for i, (_, row, column) in enumerate(cells):
                keys = [number[c] for c in cells if (c[1] - row) % mixer.interval == 0 == (c[2] - column) % mixer.interval]
                logits = torch.einsum("bd,bmd->bm", q[h][:, i], k[h][:, keys]) / math.sqrt(q[h].shape[-1])
                rows.append(torch.einsum("bm,bmd->bd", logits.softmax(-1), v[h][:, keys]))
            heads.append(torch.stack(rows, dim=1))
        signature = torch.stack([around(values, cell) for cell in cells], dim=1)
        return mixer.out_proj(torch.cat(heads, dim=-1) + signature)

    return attend


@pytest.mark.tier("T2", "mixer:long_range_grouping")
@pytest.mark.parametrize("signature", [False, True])
@pytest.mark.parametrize(
    ("grid", "interval"), [((4, 4), 2), ((3, 5), 2), ((2, 4, 6), 2), ((3, 2, 3), 3), ((2, 1, 5), 4)], ids=str
)
def test_equals_its_definition(grid, interval, signature) -> None:
    mixer = build("long_range_grouping", 6, 2, interval=interval, signature=signature)
    assert_defined_by(mixer, definition(mixer, grid), tokens(math.prod(grid), 6), grid=grid)


@given(st.data())
def test_any_grid(data) -> None:
    grid = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=3)))
    mixer = build("long_range_grouping", 6, 2, interval=data.draw(st.integers(1, 6)))
    x = tokens(math.prod(grid), 6)
    torch.testing.assert_close(mixer(x, grid=grid), definition(mixer, grid)(x), rtol=1e-9, atol=1e-11)


def test_an_interval_of_one_is_dense_attention_over_all_views() -> None:
    mixer, dense = build("long_range_grouping", interval=1, signature=False), build("softmax")
    dense.load_state_dict(mixer.state_dict())
    x = tokens(12)
    torch.testing.assert_close(mixer(x, grid=(3, 2, 2)), dense(x))


def test_what_reaches_a_token_is_its_group_in_every_view_and_its_neighbours_in_its_own() -> None:
    mixer, grid = build("long_range_grouping", 6, 2, interval=3), (2, 6, 6)
    x = tokens(72, 6, batch=1)
    place = 36 + 2 * 6 + 1
    reached = torch.autograd.grad(mixer(x, grid=grid)[0, place].sum(), x)[0][0].abs().sum(-1).view(grid) > 0
    expected = torch.zeros(grid, dtype=torch.bool)
    expected[:, 2::3, 1::3] = True
    expected[1, 1:4, 0:3] = True
    assert torch.equal(reached, expected)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="interval: expected at least 1"):
        create_mixer("long_range_grouping", 8, 2, interval=0)
    with pytest.raises(ValueError, match="position: expected 'none'"):
        create_mixer("long_range_grouping", 8, 2, position="rotary")
    with pytest.raises(UnsupportedError, match="rank 1"):
        create_mixer("long_range_grouping", 8, 2)(torch.randn(1, 6, 8))
