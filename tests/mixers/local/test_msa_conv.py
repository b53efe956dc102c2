"""Attention in a convolution's window, offset by offset, its borders, shifts and limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import UnsupportedError, create_mixer
from mixers.definition import assert_defined_by, build, tokens

WAYS = [(0, 1), (0, -1), (1, 0), (-1, 0)]


def definition(mixer, grid, mask=None):
    """The card's equations; outside of the map, and at masked cells, keys and values are zero."""
    (height, width), (rows, columns), t, heads = grid, mixer.window, mixer.dilation, mixer.num_heads
    d = mixer.dim // heads

    def shifted(x: Tensor, sign: int) -> Tensor:
        if not mixer.directions:
            return x
        size = mixer.dim // mixer.directions
        found = torch.zeros_like(x)
        for group, (down, right) in enumerate(WAYS[: mixer.directions]):
            for i in range(height * width):
                source = (i // width - sign * down * max(1, rows // 2)) % height * width
                source += (i % width - sign * right * max(1, columns // 2)) % width
                found[i, group * size : (group + 1) * size] = x[source, group * size : (group + 1) * size]
        return found

    def one(x: Tensor, here: Tensor) -> Tensor:
        x = x * here[:, None]
        q, k, v = (mixer.in_proj(shifted(x, 1)) * here[:, None]).chunk(3, dim=-1)

        def read(of: Tensor, row: int, column: int) -> Tensor:
            inside = 0 <= row < height and 0 <= column < width
            return of[row * width + column] if inside else torch.zeros_like(of[0])

        outputs = []
        for i in range(height * width):
            at = [
                (i // width + (a - rows // 2) * t, i % width + (b - columns // 2) * t)
                for a in range(rows)
                for b in range(columns)
            ]
            parts = []
            for h in range(heads):
                s = slice(h * d, (h + 1) * d)
                powers = [torch.exp(q[i, s] @ read(k, *p)[s] / math.sqrt(d)) for p in at]
                parts.append(sum(w / sum(powers) * read(v, *p)[s] for w, p in zip(powers, at, strict=True)))
            outputs.append(torch.cat(parts))
        y = (shifted(torch.stack(outputs), -1) + x) * here[:, None]
        result = []
        for i in range(height * width):
            total = 0 if mixer.conv.bias is None else mixer.conv.bias
            for a in range(rows):
                for b in range(columns):
                    total = total + mixer.conv.weight[:, :, a, b] @ read(
                        y, i // width + a - rows // 2, i % width + b - columns // 2
                    )
            result.append(total.relu())
        return torch.stack(result) * here[:, None]

    def mix(x: Tensor) -> Tensor:
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        return torch.stack([one(example, here) for example, here in zip(x, real, strict=True)])

    return mix


MASK = torch.ones(2, 12, dtype=torch.bool)
MASK[0, 8:] = False
MASK[1, [3, 5]] = False


@pytest.mark.tier("T2", "mixer:msa_conv")
@pytest.mark.parametrize(
    ("options", "heads", "grid", "mask"),
    [
        ({}, 1, (4, 3), None),
        ({"conv_bias": True}, 2, (3, 4), MASK),
        ({"window": (1, 5), "dilation": 2}, 1, (2, 6), None),
        ({"directions": 2}, 2, (3, 4), MASK),
        ({"directions": 4, "window": 5}, 1, (4, 3), None),
        ({"dilation": 3}, 1, (1, 7), None),
    ],
    ids=["plain", "masked", "rectangular", "shifted", "four ways", "short"],
)
def test_equals_its_definition(options, heads, grid, mask) -> None:
    mixer = build("msa_conv", 4, heads, **options)
    inputs = {} if mask is None else {"mask": mask}
    assert_defined_by(mixer, definition(mixer, grid, mask), tokens(math.prod(grid), 4), grid=grid, **inputs)


@settings(max_examples=8)
@given(st.integers(1, 11), st.integers(1, 11), st.sampled_from([1, 3, 5]), st.integers(1, 3))
def test_any_size(height, width, window, dilation) -> None:
    mixer = build("msa_conv", 2, 1, window=window, dilation=dilation)
    x = torch.randn(1, height * width, 2, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, grid=(height, width)), definition(mixer, (height, width))(x))


def test_padding_is_the_outside_of_the_map() -> None:
    mixer, x = build("msa_conv", 4, 2, conv_bias=True), tokens(15, 4)
    larger = torch.full((2, 6, 7, 4), 1e3, dtype=x.dtype)
    larger[:, 1:4, 2:] = x.detach().view(2, 3, 5, 4)
    mask = torch.zeros(2, 6, 7, dtype=torch.bool)
    mask[:, 1:4, 2:] = True
    padded = mixer(larger.flatten(1, 2), grid=(6, 7), mask=mask.flatten(1)).view(2, 6, 7, 4)
    torch.testing.assert_close(padded[:, 1:4, 2:], mixer(x, grid=(3, 5)).view(2, 3, 5, 4))


def test_a_window_inside_the_map_is_a_whole_softmax() -> None:
    mixer = build("msa_conv", 4, 1)
    sums = mixer.mixing_matrix(tokens(20, 4), grid=(4, 5)).sum(-1).view(2, 4, 5)
    torch.testing.assert_close(sums[:, 1:-1, 1:-1], torch.ones(2, 2, 3, dtype=sums.dtype))
    assert (sums[:, 0] < 1).all() and (sums[:, :, -1] < 1).all()


def test_refusals() -> None:
    for options, said in (
        ({"window": 2}, "window: expected one or two odd positive numbers, got 2"),
        ({"window": (3, 3, 3)}, "window: expected one or two odd"),
        ({"dilation": 0}, "dilation: expected a positive number, got 0"),
        ({"directions": 3}, "directions: expected 0 to 8, a divisor of dim=8, got 3"),
    ):
        with pytest.raises(ValueError, match=said):
            create_mixer("msa_conv", 8, **options)
    with pytest.raises(UnsupportedError, match="msa_conv"):
        create_mixer("msa_conv", 8)(torch.randn(1, 4, 8))
    with pytest.raises(UnsupportedError, match="mixing_matrix"):
        create_mixer("msa_conv", 8, directions=4).mixing_matrix(torch.randn(1, 4, 8), grid=(2, 2))
