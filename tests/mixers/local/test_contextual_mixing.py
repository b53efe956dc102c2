"""Context-mixing dynamic convolution cell by cell, what its kernels depend on, and its limits."""

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


def batch_norm(norm, x: Tensor) -> Tensor:
    return (x - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias


def project(layer, x: Tensor) -> Tensor:
    return batch_norm(layer.norm, x @ layer.conv.weight[:, :, 0, 0].T)


def means(x: Tensor, grid, sides, here: Tensor) -> tuple[Tensor, Tensor]:
    """Adaptive averages over real cells, and which boxes have any."""
    boxes, alive = [], []
    for a in range(sides[0]):
        for b in range(sides[1]):
            rows = range(a * grid[0] // sides[0], math.ceil((a + 1) * grid[0] / sides[0]))
            columns = range(b * grid[1] // sides[1], math.ceil((b + 1) * grid[1] / sides[1]))
            cells = [r * grid[1] + c for r in rows for c in columns if here[r * grid[1] + c]]
            boxes.append(torch.stack([x[i] for i in cells]).mean(0) if cells else torch.zeros_like(x[0]))
            alive.append(bool(cells))
    return torch.stack(boxes), torch.tensor(alive)[:, None]


def larger(x: Tensor, grid, to) -> Tensor:
    return F.interpolate(x.T.view(1, -1, *grid), to, mode="bilinear")[0].flatten(1).T


def definition(mixer, grid, mask=None):
    """The card's equations in evaluation mode."""
    c, groups = mixer.context_channels, mixer.num_heads // 2
    short = min(grid)
    room = grid if short >= max(mixer.windows) else tuple(int(n * max(mixer.windows) / short) for n in grid)

    def one(x: Tensor, here: Tensor) -> Tensor:
        q = project(mixer.q_proj, x if c is None else x[:, :-c]) * here[:, None]
        regions, alive = means(x if c is None else x[:, -c:], grid, (mixer.regions, mixer.regions), here)
        k = project(mixer.k_proj, regions) * alive
        v = (x if mixer.v_proj is None else project(mixer.v_proj, x)) * here[:, None]
        if room != grid:
            share = larger(here[:, None].to(x.dtype), grid, room)
            q, v = (larger(t, grid, room) / share.clamp(min=1e-30) for t in (q, v))
            seen = share[:, 0] > 0
        else:
            seen = here
        d, width = mixer.dim // groups, mixer.dim // (2 * groups)
        outputs = []
        for half, side in enumerate(mixer.windows):
            first = 0 if half == 0 else mixer.windows[0] ** 2
            for g in range(groups):
                part = slice(g * width, (g + 1) * width)
                affinity = q[:, part] @ k[:, part].T / math.sqrt(d)
                kernels = (affinity @ mixer.kernel_proj.weight.T + mixer.kernel_proj.bias)[:, first : first + side**2]
                values = v[:, (half * groups + g) * width : (half * groups + g + 1) * width]
                rows = []
                for i in range(room[0] * room[1]):
                    at = (i // room[1], i % room[1])
                    start = [min(max(p - side // 2, 0), n - side) for p, n in zip(at, room, strict=True)]
                    powers, seen_values = [], []
                    for o in range(side**2):
                        row, column = start[0] + o // side, start[1] + o % side
                        if not seen[row * room[1] + column]:
                            continue
                        bias = mixer.tables[half][g, row - at[0] + side - 1, column - at[1] + side - 1]
                        powers.append(torch.exp(kernels[i, o] + bias))
                        seen_values.append(values[row * room[1] + column])
                    found = [p / sum(powers) * value for p, value in zip(powers, seen_values, strict=True)]
                    rows.append(sum(found) if found else torch.zeros_like(values[0]))
                outputs.append(torch.stack(rows))
        y = torch.cat(outputs, dim=-1)
        y = y if room == grid else means(y, room, grid, seen)[0]
        return project(mixer.out_proj, y) * here[:, None]

    def mix(x: Tensor) -> Tensor:
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        return torch.stack([one(example, here) for example, here in zip(x, real, strict=True)])

    return mix


def build_eval(heads=4, **options):
    mixer = build("contextual_mixing", 8, heads, **options).eval()
    generator = torch.Generator().manual_seed(5)
    for name, buffer in mixer.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return mixer


MASK = torch.ones(2, 30, dtype=torch.bool)
MASK[0, 11:] = False
MASK[1, [3, 7, 8, 9, 29]] = False
SMALL = {"window": 3, "small_window": 2, "regions": 2}


@pytest.mark.tier("T2", "mixer:contextual_mixing")
@pytest.mark.parametrize(
    ("options", "grid", "mask"),
    [
        ({"window": 4, "small_window": 3, "regions": 3}, (4, 5), None),
        (SMALL, (5, 6), MASK),
        ({"window": 5, "small_window": 1, "regions": 3}, (2, 3), None),
        ({"window": 3, "small_window": 2, "regions": 2}, (1, 30), MASK),
        (SMALL | {"context_channels": 3, "project_values": False}, (3, 4), None),
    ],
    ids=["plain", "masked", "resized", "one row", "fused"],
)
def test_equals_its_definition(options, grid, mask) -> None:
    mixer = build_eval(**options)
    inputs = {} if mask is None else {"mask": mask}
    assert_defined_by(mixer, definition(mixer, grid, mask), tokens(math.prod(grid), 8), grid=grid, **inputs)


@settings(max_examples=8)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_any_size(height, width, window, small_window) -> None:
    mixer = build_eval(2, window=window, small_window=small_window, regions=3)
    x = torch.randn(1, height * width, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, grid=(height, width)), definition(mixer, (height, width))(x))


def test_kernels_depend_on_the_whole_map() -> None:
    mixer, x = build_eval(**SMALL), tokens(64, 8, batch=1)
    gradient = torch.autograd.grad(mixer(x, grid=(8, 8))[0, 0].sum(), x)[0]
    assert (gradient.abs().sum(-1) > 0).all()
    matrix = mixer.mixing_matrix(x, grid=(8, 8))
    assert ((matrix > 0).sum(-1) == torch.tensor([4, 4, 9, 9])[None, :, None]).all()


def test_refusals() -> None:
    for options, said in (
        ({"num_heads": 1}, "num_heads: expected an even number, got 1"),
        ({"window": 0}, "window: expected a positive number, got 0"),
        ({"regions": 0}, "regions: expected a positive number, got 0"),
        ({"context_channels": 8}, "context_channels: expected 1 to dim - 1 = 7, got 8"),
    ):
        with pytest.raises(ValueError, match=said):
            create_mixer("contextual_mixing", 8, **{"num_heads": 2, **options})
    with pytest.raises(UnsupportedError, match="contextual_mixing"):
        create_mixer("contextual_mixing", 8, 2)(torch.randn(1, 4, 8))
