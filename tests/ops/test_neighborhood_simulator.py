"""The simulator of tiled kernels against the dense mask, and the cases that waste nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab.ops.tile_attention.neighborhood import axes_of, neighborhood_mask
from attnlab.ops.tile_attention.neighborhood.simulate import predict_speedup


def box_of(cell, grid, dilation, tile):
    """The tile of a cell: its dilation group and its box inside that, along each axis."""
    return tuple((c % t, c // t // side) for c, t, side in zip(cell, dilation, tile, strict=True))


def counted(grid, window, stride, dilation, causal, query_tile, key_tile):
    mask = neighborhood_mask(axes_of(grid, window, stride, dilation, causal))
    cells = list(itertools.product(*(range(n) for n in grid)))
    boxes = [[box_of(cell, grid, dilation, tile) for cell in cells] for tile in (query_tile, key_tile)]
    runs = [[i // math.prod(tile) for i in range(len(cells))] for tile in (query_tile, key_tile)]
    seen = torch.nonzero(mask).tolist()
    found = [len(seen)]
    for queries, keys in (boxes, runs):
        found += [len({(queries[i], keys[j]) for i, j in seen}), len(set(queries)) * len(set(keys))]
    return found


@given(st.data())
def test_counts_equal_those_of_the_mask(data) -> None:
    rank = data.draw(st.integers(1, 3))
    grid = data.draw(st.tuples(*[st.integers(1, {1: 30, 2: 8, 3: 4}[rank])] * rank))
    dilation = tuple(data.draw(st.integers(1, min(3, n))) for n in grid)
    window = tuple(data.draw(st.integers(1, n // t)) for n, t in zip(grid, dilation, strict=True))
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    causal = tuple(data.draw(st.booleans()) for _ in grid)
    tiles = [tuple(data.draw(st.integers(1, 5)) for _ in grid) for _ in range(2)]
    found = predict_speedup(grid, window, stride, dilation, causal, query_tile=tiles[0], key_tile=tiles[1])
    ours = [found.visible_pairs, found.tile_pairs, found.all_tile_pairs, found.flat_tile_pairs, found.all_flat_tile_pairs]
    assert ours == counted(grid, window, stride, dilation, causal, *tiles)
    assert found.by_flops == found.tokens**2 / found.visible_pairs
    assert found.by_tiles == found.all_tile_pairs / found.tile_pairs
    assert found.by_flat_tiles == found.all_flat_tile_pairs / found.flat_tile_pairs


@pytest.mark.parametrize(
    ("grid", "window", "tile"),
    [((64,), (24,), (8,)), ((16, 24), (4, 12), (4, 4)), ((8, 8, 12), (4, 4, 8), (2, 4, 4)), ((9, 15), (3, 9), (3, 3))],
)
def test_stride_of_a_tile_and_window_of_whole_tiles_waste_nothing(grid, window, tile) -> None:
    exact = predict_speedup(grid, window, tile, query_tile=tile, key_tile=tile)
    odd = all((w // side) % 2 for w, side in zip(window, tile, strict=True))
    assert exact.perfectly_block_sparse == odd
    if odd:
        assert exact.waste == 0 and exact.by_tiles == exact.by_flops
    sliding = predict_speedup(grid, window, query_tile=tile, key_tile=tile)
    assert not sliding.perfectly_block_sparse and sliding.by_tiles < sliding.by_flops


def test_an_even_number_of_tiles_needs_smaller_key_tiles() -> None:
    halves = predict_speedup((64,), 16, 8, query_tile=8, key_tile=4)
    assert halves.perfectly_block_sparse and halves.by_tiles == halves.by_flops
    assert not predict_speedup((64,), 16, 8, query_tile=8, key_tile=8).perfectly_block_sparse


def test_blocks_waste_nothing() -> None:
    found = predict_speedup((16, 16), 8, 8, query_tile=(8, 8), key_tile=(4, 8))
    assert found.perfectly_block_sparse and found.by_tiles == 4


def test_boxes_beat_runs_of_the_flat_grid() -> None:
    found = predict_speedup((32, 32), 8, 8, query_tile=8, key_tile=8)
    assert found.by_tiles == 16 and found.by_flat_tiles == 4


def test_more_stride_comes_nearer_to_the_bound() -> None:
    found = [predict_speedup((64, 64), 24, s, query_tile=8, key_tile=8) for s in (1, 4, 8)]
    shares = [p.by_tiles / p.by_flops for p in found]
    assert shares == sorted(shares) and shares[-1] == 1


def test_tiles_below_one() -> None:
    with pytest.raises(ValueError, match="key_tile: expected one positive number"):
        predict_speedup((8,), 4, query_tile=4, key_tile=0)
