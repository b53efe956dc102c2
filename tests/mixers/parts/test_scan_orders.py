"""Scan orders: exact permutations of any grid, and the paths that their names promise."""

from __future__ import annotations

import itertools

import pytest
import torch

from attnlab.mixers.parts.scan_orders import ORDERS, continuous, hilbert, inverse, raster, scan_paths, visit, windows

GRIDS = [(1,), (7,), (1, 9), (9, 1), (2, 2), (3, 4), (5, 7), (11, 6), (13, 13), (8, 8), (3, 1, 5), (5, 4, 3), (2, 2, 2)]


def _cells(path, grid) -> list[tuple[int, ...]]:
    cells = list(itertools.product(*map(range, grid)))
    return [cells[token] for token in path.tolist()]


def _steps(path, grid) -> list[int]:
    """Of each step along the path the sum over axes of what changes."""
    cells = _cells(path, grid)
    return [sum(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(cells)]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_every_path_is_a_permutation_with_its_inverse(order, bidirectional) -> None:
    for grid in GRIDS:
        if order == "spectral_spatial" and len(grid) != 3:
            continue
        for path in scan_paths(order, grid, window=2, bidirectional=bidirectional):
            n = len(path)
            assert sorted(path.tolist()) == list(range(n))
            x = torch.arange(2 * n).view(2, n)
            assert torch.equal(visit(visit(x, path), inverse(path)), x)


@pytest.mark.parametrize("grid", GRIDS)
def test_snakes_step_to_neighbours(grid) -> None:
    for axis in range(len(grid)):
        path = continuous(grid, axis)
        assert set(_steps(path, grid)) <= {1}
        side = grid[axis]
        for start in range(0, len(path), side):
            row = _cells(path, grid)[start : start + side]
            assert len({cell[axis] for cell in row}) == side  # along the axis first


def test_hilbert_curves_of_powers_of_two_step_to_neighbours() -> None:
    for grid in [(2, 2), (4, 4), (16, 16), (2, 2, 2), (4, 4, 4), (8, 8, 8), (2, 2, 2, 2)]:
        assert set(_steps(hilbert(grid), grid)) == {1}


def test_hilbert_curves_of_rectangles_step_to_neighbours_but_for_one_diagonal() -> None:
    for height, width in itertools.product(range(1, 14), repeat=2):
        steps = _steps(hilbert((height, width)), (height, width))
        assert set(steps) <= {1, 2}
        assert steps.count(2) <= 1
        cells = torch.tensor(_cells(hilbert((height, width)), (height, width)))
        assert len(cells) == 1 or int((cells[1:] - cells[:-1]).abs().max()) == 1


def test_a_hilbert_curve_fills_a_quarter_before_it_leaves_it() -> None:
    path = hilbert((8, 8))
    for quarter in path.view(4, 16):
        assert len({(cell // 32, cell % 8 // 4) for cell in quarter.tolist()}) == 1


def test_windows_are_filled_one_after_the_other() -> None:
    assert windows((3, 4), 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]
    assert windows((3, 4), 2, 0).tolist() == [0, 4, 1, 5, 8, 9, 2, 6, 3, 7, 10, 11]
    assert windows((3, 4), 9).tolist() == list(range(12))


def test_orders_by_name() -> None:
    assert raster((2, 3), 0).tolist() == [0, 3, 1, 4, 2, 5]
    assert [path.tolist() for path in scan_paths("cross", (2, 3), bidirectional=True)] == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]
    assert [path.tolist() for path in scan_paths("continuous", (2, 3))] == [[0, 1, 2, 5, 4, 3], [0, 3, 4, 1, 2, 5]]
    assert [path.tolist() for path in scan_paths("spectral_spatial", (2, 1, 3))] == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]]


@pytest.mark.parametrize(
    ("order", "grid", "window", "message"),
    [("spiral", (2, 2), 2, "order"), ("raster", (4,), 0, "window"), ("spectral_spatial", (2, 2), 2, "rank 2")],
)
def test_bad_orders(order, grid, window, message) -> None:
    with pytest.raises(ValueError, match=message):
        scan_paths(order, grid, window=window)
