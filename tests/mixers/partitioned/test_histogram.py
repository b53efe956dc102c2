"""Histogram attention pixel by pixel, its bins, and images inside larger ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer
from attnlab.core.errors import UnsupportedError
from attnlab.mixers.partitioned.histogram import Bins, order
from mixers.definition import assert_defined_by, build, tokens


def sort_pixels(x: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Scalars in ascending order, and where each came from."""
    ranks = sorted(range(len(x)), key=lambda i: float(x[i].detach()))
    return [x[i] for i in ranks], ranks


def binned(rows: list[list[Tensor]], f: int, contiguous: bool) -> list[tuple[list[int], list[Tensor]]]:
    """For each channel and bin the ranks it holds and their values; zeros fill the last ones up."""
    n = len(rows[0])
    width = -(-n // f)
    found = []
    for row in rows:
        for b in range(f):
            ranks = range(b * width, (b + 1) * width) if contiguous else range(b, width * f, f)
            found.append((list(ranks), [row[r] if r < n else torch.zeros_like(row[0]) for r in ranks]))
    return found


def among(mixer, q, k, v, f: int, contiguous: bool) -> list[list[Tensor]]:
    """The attention of one arrangement, for ranked channels."""
    d, n = mixer.dim // mixer.num_heads, len(v[0])
    out = [[torch.zeros(())] * n for _ in v]
    for h in range(mixer.num_heads):
        own = slice(h * d, (h + 1) * d)
        queries, keys, values = (binned(t[own], f, contiguous) for t in (q, k, v))
        units = [torch.stack(x) / torch.stack(x).norm() for _, x in keys]
        for a, (ranks, x) in enumerate(queries):
            query = torch.stack(x) / torch.stack(x).norm()
            weights = [torch.exp(mixer.temperature[h] * (query * unit).sum()) for unit in units]
            total = 1 + sum(weights)
            y = sum(w / total * torch.stack(value) for w, (_, value) in zip(weights, values, strict=True))
            for place, rank in enumerate(ranks):
                if rank < n:
                    out[h * d + a // f][rank] = y[place]
    return out


def definition(mixer, grid: tuple[int, int]):
    height, width = grid

    def one(x: Tensor) -> Tensor:
        image = x.mT.unflatten(1, grid)
        half, n = mixer.dim // 2, height * width
        cells = [[[image[c, i, j] for j in range(width)] for i in range(height)] for c in range(mixer.dim)]
        column_orders, row_orders = {}, {}
        for c in range(half):
            for j in range(width):
                ascending, column_orders[c, j] = sort_pixels([cells[c][i][j] for i in range(height)])
                for i in range(height):
                    cells[c][i][j] = ascending[i]
            for i in range(height):
                cells[c][i], row_orders[c, i] = sort_pixels(cells[c][i])
        image = torch.stack([torch.stack([torch.stack(row) for row in channel]) for channel in cells])
        projected = torch.nn.functional.conv2d(image[None], mixer.in_proj.weight[:, :, None, None], mixer.in_proj.bias)
        weight, bias = mixer.conv.weight, mixer.conv.bias
        convolved = torch.nn.functional.conv2d(projected, weight, bias, padding=1, groups=len(weight))[0].flatten(1)
        q1, k1, q2, k2, v = convolved.chunk(5)
        ranks = [sort_pixels(list(row))[1] for row in v]
        ranked = [[[row[i] for i in own] for row, own in zip(t, ranks, strict=True)] for t in (q1, k1, q2, k2, v)]
        first = among(mixer, ranked[0], ranked[1], ranked[4], mixer.num_bins, True)
        second = among(mixer, ranked[2], ranked[3], ranked[4], mixer.num_bins, False)
        product = [[torch.zeros(())] * n for _ in range(mixer.dim)]
        for c in range(mixer.dim):
            for rank, i in enumerate(ranks[c]):
                product[c][i] = first[c][rank] * second[c][rank]
        y = mixer.out_proj(torch.stack([torch.stack(row) for row in product]).mT).mT.unflatten(1, grid)
        out = [[[y[c, i, j] for j in range(width)] for i in range(height)] for c in range(mixer.dim)]
        for c in range(half):
            for i in range(height):
                row = [out[c][i][j] for j in range(width)]
                for j in range(width):
                    out[c][i][row_orders[c, i][j]] = row[j]
            for j in range(width):
                column = [out[c][i][j] for i in range(height)]
                for i in range(height):
                    out[c][column_orders[c, j][i]][j] = column[i]
        return torch.stack([torch.stack([torch.stack(row) for row in channel]) for channel in out]).flatten(1).mT

    return lambda x: torch.stack([one(example) for example in x])


@pytest.mark.tier("T2", "mixer:histogram")
@pytest.mark.parametrize(
    ("grid", "heads", "options"),
    [((3, 4), 2, {}), ((3, 5), 2, {"bias": True}), ((5, 2), 1, {"num_bins": 3}), ((4, 2), 4, {})],
    ids=str,
)
def test_equals_its_definition(grid, heads, options) -> None:
    mixer = build("histogram", 4, heads, **options)
    assert_defined_by(mixer, definition(mixer, grid), tokens(math.prod(grid), 4), grid=grid)


@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.data())
def test_bins_come_back_and_are_equally_full(length, count, contiguous, data) -> None:
    real = data.draw(st.integers(0, length))
    bins = Bins.of(length, count, torch.tensor([real]), contiguous=contiguous)
    x = torch.randn(1, 2, length)
    torch.testing.assert_close(bins.merge(bins.split(x))[..., :real], x[..., :real])
    full = (bins.ranks[0] >= 0).sum(-1)
    assert int(full.sum()) == real and int(full.max()) == -(-real // count)


def test_order_keeps_masked_entries_where_they_are() -> None:
    x = torch.tensor([[[5.0, 9.0, float("inf"), 1.0, 7.0]]])
    real = torch.tensor([[[True, False, True, True, False]]])
    assert x.gather(2, order(x, real, dim=2)).tolist() == [[[1.0, 9.0, 5.0, float("inf"), 7.0]]]
    assert order(x, real, dim=2, masked_last=True).tolist() == [[[3, 0, 2, 1, 4]]]


def test_an_image_in_a_corner_of_a_larger_one() -> None:
    mixer = build("histogram", 8, 2)
    small = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    large = torch.full((2, 4, 7, 8), float("nan"), dtype=torch.float64)
    large[:, :3, :5] = small
    mask = torch.zeros(2, 4, 7, dtype=torch.bool)
    mask[:, :3, :5] = True
    y = mixer(large.flatten(1, 2), mask=mask.flatten(1), grid=(4, 7)).unflatten(1, (4, 7))
    torch.testing.assert_close(y[:, :3, :5], mixer(small.flatten(1, 2), grid=(3, 5)).unflatten(1, (3, 5)))


def test_permuted_pixels_give_permuted_outputs_without_neighbours() -> None:
    mixer = build("histogram", 8, 2)
    with torch.no_grad():
        mixer.conv.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0.0
        mixer.in_proj.weight[:, :4] = 0.0  # the half that is sorted first
        mixer.out_proj.weight[:4] = 0.0
    x, places = tokens(20, 8), torch.randperm(20)
    torch.testing.assert_close(mixer(x[:, places], grid=(4, 5)), mixer(x, grid=(4, 5))[:, places])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_bins: expected at least 1"):
        create_mixer("histogram", 8, 2, num_bins=0)
    with pytest.raises(UnsupportedError, match="rank 1"):
        create_mixer("histogram", 8, 2)(torch.randn(1, 6, 8))
