"""Biases by absolute offset: the table's entries, ranks, streaming, and grids that are too large."""

from __future__ import annotations

import pytest
import torch

from attnlab import create_mixer
from attnlab.positions import create_position

GRIDS = [((3, 4), 2), ((4,), 2), ((2, 3, 2), 3), ((2, 2), 3), ((4,), 1)]


def _cells(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    cells: list[tuple[int, ...]] = [()]
    for side in grid:
        cells = [(*cell, i) for cell in cells for i in range(side)]
    return cells


@pytest.mark.tier("T2", "position:absolute_offsets")
@pytest.mark.parametrize(("grid", "rank"), GRIDS, ids=str)
def test_the_entry_of_the_offset(grid, rank) -> None:
    position = create_position("absolute_offsets", 2, 3, {"size": 4, "rank": rank}).double()
    torch.nn.init.normal_(position.table)
    cells = _cells(grid)
    bias = position.bias(torch.zeros(1, 2, len(cells), 3, dtype=torch.float64), len(cells), causal=False, grid=grid)
    assert bias.shape == (1, 2, len(cells), len(cells))
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            offset = (0,) * (rank - len(grid)) + tuple(abs(p - q) for p, q in zip(a, b, strict=True))
            for h in range(2):
                assert bias[0, h, i, j] == position.table[h][offset]


def test_it_streams() -> None:
    mixer = create_mixer("softmax", 16, 2, causal=True, position="absolute_offsets", position_options={"size": 9}).double()
    torch.nn.init.normal_(mixer.position.table)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    first, state = mixer.extend(x[:, :4], mixer.init_state(1))
    second, _ = mixer.extend(x[:, 4:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), mixer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grid", [(2, 8), (2, 2, 4), None], ids=str)
def test_a_grid_that_is_too_large(grid) -> None:
    with pytest.raises(ValueError, match="up to size=7"):
        create_mixer("softmax", 16, 2, position="absolute_offsets")(torch.randn(1, 16, 16), grid=grid)


@pytest.mark.parametrize("options", [{"size": 0}, {"rank": 0}])
def test_bad_options(options) -> None:
    with pytest.raises(ValueError, match="size, rank"):
        create_position("absolute_offsets", 2, 4, options)
