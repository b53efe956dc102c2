"""Windows of varied size against loops over windows, points and cells, and what they are without regression."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnlab
from attnlab import create_mixer, record
from mixers.definition import assert_defined_by, build, split_heads, tokens


def read(x: Tensor, row: Tensor, column: Tensor, grid) -> Tensor:
    """One example's map (n, d) between its cells."""
    total = torch.zeros_like(x[0])
    for i in range(grid[0]):
        for j in range(grid[1]):
            weight = (1 - (row - i).abs()).clamp(min=0) * (1 - (column - j).abs()).clamp(min=0)
            total = total + weight * x[i * grid[1] + j]
    return total


def definition(mixer, grid, w, mask=None):
    """The card's equations in normalised coordinates, -1 at the first cell and 1 at the last of the padded map."""
    height, width = grid
    padded = [-(-n // w) * w for n in grid]

    def coordinate(pixel: int, n: int) -> float:
        return -1 + 2 * pixel / (n - 1)

    def window(x: Tensor, heads: list[tuple[Tensor, Tensor, Tensor]], top: int, left: int) -> dict[int, Tensor]:
        """The head outputs of the queries of one window."""
        inside = [(y, z) for y in range(top, top + w) for z in range(left, left + w)]
        real = [(y, z) for y, z in inside if y < height and z < width]
        mean = sum(x[y * width + z] for y, z in real) / w**2
        shift, scale = (layer(F.leaky_relu(mean, 0.01)) for layer in (mixer.shift_proj, mixer.scale_proj))
        outputs: dict[int, list[Tensor]] = {y * width + z: [] for y, z in real}
        for h, (q, k, v) in enumerate(heads):
            keys, values = [], []
            for cell in inside:
                at = []
                for axis, first, n, unpadded, component in ((0, top, padded[0], height, 1), (1, left, padded[1], width, 0)):
                    center = sum(coordinate(first + i, n) for i in range(w)) / w
                    offset = shift[2 * h + component] / (unpadded // w)
                    place = center + (coordinate(cell[axis], n) - center) * (1 + scale[2 * h + component]) + offset
                    at.append((place + 1) / 2 * (n - 1))
                keys.append(read(k, *at, grid))
                values.append(read(v, *at, grid))
            for y, z in real:
                logits = torch.stack([q[y * width + z] @ key for key in keys]) / math.sqrt(q.shape[-1])
                if mixer.position_name != "none":
                    table = mixer.position.table[h]
                    logits = logits + torch.stack([table[y - cell[0] + w - 1, z - cell[1] + w - 1] for cell in inside])
                outputs[y * width + z].append(logits.softmax(-1) @ torch.stack(values))
        return {cell: torch.cat(parts) for cell, parts in outputs.items()}

    def attend(x: Tensor) -> Tensor:
        found = []
        for tokens_ in x:
            parts = [split_heads(p(tokens_), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
            if mask is not None:
                parts[1:] = [[t.masked_fill(~mask[:, None], 0.0) for t in part] for part in parts[1:]]
            heads = list(zip(*parts, strict=True))
            rows: dict[int, Tensor] = {}
            for top in range(0, height, w):
                for left in range(0, width, w):
                    rows |= window(tokens_, heads, top, left)
            found.append(torch.stack([rows[i] for i in range(height * width)]))
        y = mixer.out_proj(torch.stack(found))
        return y if mask is None else y.masked_fill(~mask[:, None], 0.0)

    return attend


def table(w):
    return {"position": "offset_table", "position_options": {"size": w}, "qkv_bias": True}


@pytest.mark.tier("T2", "mixer:varied_size_window")
@pytest.mark.parametrize(("grid", "w"), [((2, 4), 2), ((5, 3), 2), ((3, 4), 3)], ids=str)
def test_equals_its_definition(grid, w) -> None:
    mixer = build("varied_size_window", 4, 2, window=w, **table(w))
    x = tokens(math.prod(grid), 4)
    assert_defined_by(mixer, definition(mixer, grid, w), x, grid=grid)
    mask = torch.ones(x.shape[1], dtype=torch.bool)
    mask[1] = False
    masked = definition(mixer, grid, w, mask)
    assert_defined_by(mixer, lambda y: masked(y.masked_fill(~mask[:, None], 0.0)), x, grid=grid, mask=mask.expand(2, -1))


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 3), st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_any_sizes(w, more) -> None:
    grid = tuple(w + extra for extra in more)
    mixer = build("varied_size_window", 4, 1, window=w)
    x = tokens(math.prod(grid), 4, 1)
    torch.testing.assert_close(mixer(x, grid=grid), definition(mixer, grid, w)(x), rtol=1e-9, atol=1e-12)


def unregressed(**options):
    mixer = build("varied_size_window", **options)
    with torch.no_grad():
        for layer in (mixer.shift_proj, mixer.scale_proj):
            layer.weight.zero_(), layer.bias.zero_()
    return mixer


def test_without_regression_it_is_window_attention() -> None:
    mixer, window = unregressed(window=3, **table(3)), build("window", window=3, **table(3))
    window.load_state_dict({name: value for name, value in mixer.state_dict().items() if name in window.state_dict()})
    x = tokens(54)
    torch.testing.assert_close(mixer(x, grid=(6, 9)), window(x, grid=(6, 9)))


def test_one_window_is_dense_attention() -> None:
    mixer, dense = unregressed(window=4), build("softmax")
    dense.load_state_dict({name: value for name, value in mixer.state_dict().items() if name in dense.state_dict()})
    x = tokens(16)
    torch.testing.assert_close(mixer(x, grid=(4, 4)), dense(x))


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (2, 1)])
def test_maps_smaller_than_a_window(grid) -> None:
    x = tokens(math.prod(grid))
    y = build("varied_size_window", window=3)(x, grid=grid)
    assert y.isfinite().all()
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_a_new_mixer_starts_at_its_windows_and_records_its_boxes() -> None:
    mixer = create_mixer("varied_size_window", 8, 2, window=2)
    with record(mixer, only=("shift", "scale")) as tape:
        mixer(torch.randn(1, 12, 8), grid=(3, 4))
    assert tape["shift"].shape == (1, 2, 4, 2)
    assert torch.equal(tape["shift"], torch.zeros(1, 2, 4, 2))
    assert torch.equal(tape["scale"], torch.ones(1, 2, 4, 2))


def test_boxes_of_shared_keys_keep_the_laws() -> None:
    attnlab.check("varied_size_window", options={"window": 3, "num_kv_heads": 2, **table(3)}).raise_if_failed()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 0}, "window: expected at least 1"), ({"position": "relative"}, "position: expected a bias")],
)
def test_refusals(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("varied_size_window", 8, 2, **options)(torch.randn(1, 4, 8), grid=(2, 2))
