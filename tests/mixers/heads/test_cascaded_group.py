"""Cascaded group attention by its definition, cell by cell."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import check, create_mixer, record
from mixers.definition import assert_defined_by, build, tokens


def _norm(rows: list[Tensor], part, training: bool) -> list[Tensor]:
    """BatchNorm of what is listed, each (c,)."""
    norm = part.norm
    mean, variance = norm.running_mean, norm.running_var
    if training:
        mean = sum(rows) / len(rows)
        variance = sum((row - mean) ** 2 for row in rows) / len(rows)
    return [(row - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias for row in rows]


def _cells(grid: tuple[int, int], window: int, whole: bool) -> list[list[tuple[int, int]]]:
    """The cells of each window; with ``whole`` also those outside the grid."""
    height, width = grid
    found = []
    for top in range(0, height, window):
        for left in range(0, width, window):
            cells = [(y, x) for y in range(top, top + window) for x in range(left, left + window)]
            found.append([(y, x) for y, x in cells if whole or (y < height and x < width)])
    return found


def _definition(mixer, x: Tensor, grid: tuple[int, int], whole: bool, training: bool) -> Tensor:
    b, _, dim = x.shape
    heads, keys, width = mixer.num_heads, mixer.key_dim, dim // mixer.num_heads
    windows = [(e, cells) for e in range(b) for cells in _cells(grid, mixer.window, whole)]
    where = [(e, i, cell) for i, (e, cells) in enumerate(windows) for cell in cells]

    def token(e: int, cell: tuple[int, int]) -> Tensor:
        inside = cell[0] < grid[0] and cell[1] < grid[1]
        return x[e, cell[0] * grid[1] + cell[1]] if inside else torch.zeros(dim, dtype=x.dtype)

    before: dict[tuple, Tensor] = {}
    outputs: dict[tuple, list[Tensor]] = {place: [] for place in where}
    for h in range(heads):
        parts = [token(e, cell)[h * width : (h + 1) * width] for e, _, cell in where]
        if h:
            parts = [part + before[place] for part, place in zip(parts, where, strict=True)]
        weight = mixer.qkvs[h].conv.weight[:, :, 0, 0]
        qkv = dict(zip(where, _norm([weight @ part for part in parts], mixer.qkvs[h], training), strict=True))
        kernel = mixer.q_convs[h].conv.weight
        half = kernel.shape[-1] // 2
        raw = []
        for e, i, (cy, cx) in where:
            total = torch.zeros(keys, dtype=x.dtype)
            for dy in range(-half, half + 1):
                for dx in range(-half, half + 1):
                    if (e, i, (cy + dy, cx + dx)) in qkv:
                        total = total + kernel[:, 0, dy + half, dx + half] * qkv[e, i, (cy + dy, cx + dx)][:keys]
            raw.append(total)
        queries = _norm(raw, mixer.q_convs[h], training)
        for place, q in zip(where, queries, strict=True):
            e, i, (cy, cx) = place
            others = [other for other in where if other[1] == i]
            logits = torch.stack(
                [
                    (q * qkv[other][keys : 2 * keys]).sum() / math.sqrt(keys)
                    + mixer.position.table[h, abs(cy - other[2][0]), abs(cx - other[2][1])]
                    for other in others
                ]
            )
            shares = logits.exp() / logits.exp().sum()
            before[place] = sum(share * qkv[other][2 * keys :] for share, other in zip(shares, others, strict=True))
        for place in where:
            outputs[place].append(before[place])
    weight = mixer.out_proj.conv.weight[:, :, 0, 0]
    rows = _norm([weight @ torch.relu(torch.cat(outputs[place])) for place in where], mixer.out_proj, training)
    found = {(e, cell): row for (e, _, cell), row in zip(where, rows, strict=True)}
    cells = [(cy, cx) for cy in range(grid[0]) for cx in range(grid[1])]
    return torch.stack([torch.stack([found[e, cell] for cell in cells]) for e in range(b)])


@pytest.mark.tier("T2", "mixer:cascaded_group")
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    ("grid", "border"), [((4, 2), "masked"), ((3, 4), "masked"), ((2, 3), "zero_tokens"), ((1, 5), "masked")], ids=str
)
def test_cascaded_group(grid, border, training) -> None:
    options = {"key_dim": 2, "kernels": (3, 1, 3), "window": 2, "border": border, "out_scale": 1.0}
    mixer = build("cascaded_group", 6, 3, **options).train(training)
    n = grid[0] * grid[1]
    x, whole = tokens(n, 6), border == "zero_tokens"
    assert_defined_by(mixer, lambda x: _definition(mixer, x, grid, whole, training), x, grid=grid)


@pytest.mark.tier("T2", "mixer:cascaded_group")
def test_a_sequence_is_a_grid_of_height_one() -> None:
    mixer = build("cascaded_group", 6, 3, key_dim=2, kernels=3, window=3).eval()
    x = tokens(7, 6)
    assert torch.equal(mixer(x), mixer(x, grid=(1, 7)))


def test_the_laws_hold_with_filled_windows_where_nothing_is_cut() -> None:
    options = {"window": 5, "key_dim": 4, "kernels": 3, "border": "zero_tokens", "out_scale": 1.0}
    report = check("cascaded_group", options=options, only=["padding_inside", "empty_rows", "grid_ranks"])
    assert report.passed, str(report)


def test_each_head_reads_the_one_before() -> None:
    mixer = build("cascaded_group", 6, 3, key_dim=2, kernels=1, window=3).eval()
    x = tokens(9, 6)
    with record(mixer, only=["mixed"]) as tape:
        mixer(x, grid=(3, 3))
    (gradient,) = torch.autograd.grad(tape["mixed"][:, 1].sum(), x)
    assert float(gradient[..., :4].abs().amax((0, 1)).min()) > 0
    assert (gradient[..., 4:] == 0).all()


def test_a_new_one_adds_nothing() -> None:
    assert (create_mixer("cascaded_group", 8, 2)(torch.randn(1, 9, 8), grid=(3, 3)) == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": (3, 3)}, "kernels"),
        ({"kernels": 4}, "odd"),
        ({"key_dim": 0}, "key_dim"),
        ({"window": 0}, "window"),
        ({"border": "wrap"}, "border"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("cascaded_group", 12, 3, **options)
