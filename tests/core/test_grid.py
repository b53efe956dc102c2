"""Grids, windows and masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab.core.grid import from_grid, resolve_grid, to_grid
from attnlab.core.masks import allowed_pairs, check_mask, zero_masked
from attnlab.core.windows import Windows

sides = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@given(sides)
def test_to_grid_and_back(grid: list[int]) -> None:
    x = torch.randn(2, math.prod(grid), 3)
    image = to_grid(x, tuple(grid))
    assert image.shape == (2, 3, *grid)
    assert torch.equal(from_grid(image), x)


@given(sides, st.integers(1, 4))
def test_windows_are_a_rearrangement_with_an_inverse(grid: list[int], window: int) -> None:
    windows = Windows(tuple(grid), (window,) * len(grid))
    x = torch.arange(1, math.prod(grid) + 1).view(1, -1, 1)
    parts = windows.split(x)
    assert parts.shape == (1, math.prod(windows.counts), window ** len(grid), 1)
    assert torch.equal(windows.merge(parts), x)
    assert torch.equal(parts[parts > 0].sort().values, x.flatten())


def test_a_window_holds_neighbours() -> None:
    windows = Windows((4, 4), (2, 2))
    parts = windows.split(torch.arange(16).view(1, 16, 1))[0, :, :, 0]
    assert parts.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(
    ("grid", "error"), [((2, 3), ValueError), ((0, 4), ValueError), ("22", TypeError), ((2.0, 2.0), TypeError)]
)
def test_bad_grids(grid, error) -> None:
    with pytest.raises(error, match="grid"):
        resolve_grid(grid, 4)


def test_masks_refuse_floats_and_wrong_shapes() -> None:
    with pytest.raises(TypeError, match=r"mask: expected dtype torch\.bool"):
        check_mask("mask", torch.full((2, 3), float("nan")), (2, 3))
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 3\)"):
        check_mask("mask", torch.ones(3, 2, dtype=torch.bool), (2, 3))


def test_zero_masked_stops_nan_both_ways() -> None:
    x = torch.tensor([[[float("nan")], [2.0]]], requires_grad=True)
    y = zero_masked(x, torch.tensor([[False, True]]))
    y.square().sum().backward()
    assert y.flatten().tolist() == [0.0, 2.0]
    assert x.grad.flatten().tolist() == [0.0, 4.0]


def test_the_last_query_sees_every_key() -> None:
    allowed = allowed_pairs(2, 4, causal=True, key_mask=None, pair_mask=None, device=torch.device("cpu"))
    assert allowed[0, 0].tolist() == [[True, True, True, False], [True, True, True, True]]
