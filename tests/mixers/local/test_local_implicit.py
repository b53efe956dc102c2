"""Local implicit attention point by point and key by key, between the cells, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import UnsupportedError, create_mixer
from mixers.definition import assert_defined_by, build, tokens


def half_even(x: float) -> int:
    return round(x)  # Python's own rule


def definition(mixer, grid, points, cell, mask=None):
    """The card's equations, with the bias whole: constant and time phases are whatever they are."""
    (frames, height, width), r, rt, heads = grid, mixer.radius, mixer.frames, mixer.num_heads
    phases = [2 ** (10 * i / max(1, mixer.frequencies - 1)) - 1 for i in range(mixer.frequencies)]
    d = mixer.dim // heads

    def one(x: Tensor, here: Tensor) -> Tensor:
        def project(conv) -> Tensor:
            volume = (x * here[:, None]).T.reshape(1, -1, *grid)
            return F.conv3d(volume, conv.weight, conv.bias, padding=1)[0].flatten(1).T * here[:, None]

        q, k, v = (project(conv) for conv in (mixer.q_proj, mixer.k_proj, mixer.v_proj))

        def at(of: Tensor, frame: int, row: int, column: int) -> Tensor:
            if not (0 <= row < height and 0 <= column < width):
                return torch.zeros_like(of[0])
            return of[(min(max(frame, 0), frames - 1) * height + row) * width + column]

        outputs = []
        for time, y, z in points:
            center = half_even(time)
            places = (time - center + rt, ((y + 1) * height - 1) / 2, ((z + 1) * width - 1) / 2)
            query = torch.zeros_like(q[0])
            for corner in ((a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)):
                cells = [math.floor(p) + more for p, more in zip(places, corner, strict=True)]
                share = math.prod(1 - abs(p - c) for p, c in zip(places, cells, strict=True))
                if 0 <= cells[0] <= 2 * rt and share > 0:
                    query = query + share * at(q, center + cells[0] - rt, *cells[1:])
            near = [min(max(half_even(p), 0), n - 1) for p, n in zip(places[1:], (height, width), strict=True)]
            weighted = []
            for f in range(-rt, rt + 1):
                keys = [(near[0] + a, near[1] + b) for a in range(-r, r + 1) for b in range(-r, r + 1)]
                shares = []
                for h in range(heads):
                    s = slice(h * d, (h + 1) * d)
                    logits = []
                    for row, column in keys:
                        offset = (y - ((2 * row + 1) / height - 1)) * height
                        encoded = [g(offset * phase) for g in (math.sin, math.cos) for phase in phases]
                        bias = mixer.offset_bias.weight[0] @ torch.tensor(encoded, dtype=x.dtype) + 0.7 * (time - center - f)
                        logits.append(query[s] @ at(k, center + f, row, column)[s] / math.sqrt(d) + bias)
                    shares.append(torch.stack(logits).softmax(0))
                for o, key in enumerate(keys):
                    value = at(v, center + f, *key)
                    weighted.append(torch.cat([shares[h][o] * value[h * d : (h + 1) * d] for h in range(heads)]))
            near_values = torch.cat(weighted) if mixer.aggregate == "concat" else sum(weighted)
            hidden = mixer.first(torch.cat((near_values, query, torch.tensor(cell, dtype=x.dtype))))
            for layer in mixer.layers:
                hidden = layer(F.gelu(hidden))
            outputs.append(hidden)
        return torch.stack(outputs)

    def mix(x: Tensor) -> Tensor:
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        return torch.stack([one(example, here) for example, here in zip(x, real, strict=True)])

    return mix


def centers(grid) -> list[tuple[float, float, float]]:
    sides = [[(2 * i + 1) / n - 1 for i in range(n)] for n in grid[1:]]
    return [(float(t), y, z) for t in range(grid[0]) for y in sides[0] for z in sides[1]]


MASK = torch.ones(1, 12, dtype=torch.bool)
MASK[0, [0, 5, 6, 11]] = False
SMALL = {"radius": 1, "frames": 1, "hidden": (5,), "frequencies": 3}


@pytest.mark.tier("T2", "mixer:local_implicit")
@pytest.mark.parametrize(
    ("options", "grid", "mask"),
    [
        (SMALL, (2, 2, 3), None),
        (SMALL | {"aggregate": "sum", "hidden": (5, 3)}, (2, 3, 2), MASK),
        (SMALL | {"frames": 0}, (1, 3, 4), MASK),
        (SMALL | {"radius": 0}, (3, 1, 2), None),
    ],
    ids=["plain", "summed", "one frame", "one key"],
)
def test_equals_its_definition(options, grid, mask) -> None:
    mixer = build("local_implicit", 4, 2, **options)
    inner = definition(mixer, grid, centers(grid), (2.0, 2.0), mask)
    inputs = {} if mask is None else {"mask": mask}

    def whole(x: Tensor) -> Tensor:
        return inner(x) if mask is None else inner(x) * mask[..., None]

    assert_defined_by(mixer, whole, tokens(math.prod(grid), 4, batch=1), grid=grid, **inputs)


@settings(max_examples=8)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-0.99, 0.99), st.floats(-0.99, 0.99)), min_size=1, max_size=3))
def test_points_between_the_cells(found) -> None:
    mixer, grid = build("local_implicit", 4, 2, **SMALL), (3, 2, 3)
    points = [(2 * time, y, z) for time, y, z in found]
    # next to a tie the nearest cell hangs on rounding
    ties = [abs(p % 1 - 0.5) < 1e-6 for t, y, z in points for p in (t, (y + 1) - 0.5, ((z + 1) * 3 - 1) / 2)]
    if any(ties):
        return
    x = torch.randn(1, 18, 4, dtype=torch.float64)
    ours = mixer.sample(x, torch.tensor(points, dtype=torch.float64), grid=grid, cell=(1.0, 0.5))
    torch.testing.assert_close(ours, definition(mixer, grid, points, (1.0, 0.5))(x))


def test_its_own_centers_are_points_as_any() -> None:
    mixer, grid = build("local_implicit", 4, 2, **SMALL), (2, 3, 4)
    x = tokens(24, 4)
    points = torch.tensor(centers(grid), dtype=torch.float64)
    torch.testing.assert_close(mixer(x, grid=grid), mixer.sample(x, points, grid=grid))
    still = tokens(12, 4)
    torch.testing.assert_close(mixer(still, grid=(3, 4)), mixer(still, grid=(1, 3, 4)))


def test_refusals() -> None:
    for options, said in (
        ({"radius": -1}, "radius, frames: expected at least 0"),
        ({"frequencies": 0}, "frequencies, hidden: expected positive numbers"),
        ({"hidden": ()}, "frequencies, hidden: expected positive numbers"),
        ({"aggregate": "mean"}, "aggregate: expected 'concat' or 'sum', got 'mean'"),
    ):
        with pytest.raises(ValueError, match=said):
            create_mixer("local_implicit", 8, 2, **options)
    with pytest.raises(UnsupportedError, match="local_implicit"):
        create_mixer("local_implicit", 8, 2, **SMALL)(torch.randn(1, 4, 8))
    with pytest.raises(ValueError, match="grid: expected three sides"):
        create_mixer("local_implicit", 8, 2, **SMALL).sample(torch.randn(1, 4, 8), torch.zeros(1, 3), grid=(2, 2))
