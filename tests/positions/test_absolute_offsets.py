"""Biases by absolute offset: the table's entries, ranks, streaming, and longer grids."""

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


def test_a_longer_grid_resizes_absolute_offsets_but_not_a_causal_line() -> None:
    position = create_position("absolute_offsets", 1, 4, {"size": 3}).double()
    with torch.no_grad():
        position.table.copy_(torch.arange(3.0)[None, :, None].expand(1, 3, 3))  # grows with the row offset
    q = torch.zeros(1, 1, 25, 4, dtype=torch.float64)
    bias = position.bias(q, 25, causal=False, grid=(5, 5))[0, 0].detach()
    assert float(bias[0, 24]) == pytest.approx(2.0)  # four rows apart of four: the table's end
    assert float(bias[0, 10]) == pytest.approx(1.0)
    line = create_position("absolute_offsets", 1, 4, {"size": 3, "rank": 1}).double()
    with torch.no_grad():
        line.table.copy_(torch.arange(3.0)[None])
    assert line.bias(q, 25, causal=True, grid=None)[0, 0, 20].tolist() == [2.0] * 19 + [1.0, 0.0, 1.0, 2.0, 2.0, 2.0]


def test_a_grid_of_a_higher_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="built for rank 2"):
        create_mixer("softmax", 16, 2, position="absolute_offsets")(torch.randn(1, 16, 16), grid=(2, 2, 4))


@pytest.mark.parametrize("options", [{"size": 0}, {"rank": 0}, {"rank": 4}])
def test_bad_options(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        create_position("absolute_offsets", 2, 4, options)
