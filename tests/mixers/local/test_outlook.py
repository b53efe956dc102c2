"""Outlook attention window by window, its fixed filter, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import UnsupportedError, create_mixer
from attnlab.ops.aggregation import fold_kernels
from attnlab.ops.aggregation.folding import _fold, _unfold
from mixers.definition import assert_defined_by, build, tokens


def definition(mixer, grid, mask=None):
    """The card's equations: windows are unfolded, mixed and summed one by one."""
    (height, width), k, s, heads = grid, mixer.window, mixer.stride, mixer.num_heads
    d = mixer.dim // heads

    def mix(x: Tensor) -> Tensor:
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        examples = []
        for example, here in zip(x, real, strict=True):
            v = mixer.v_proj(example)
            outputs = [torch.zeros(mixer.dim, dtype=x.dtype) for _ in range(height * width)]
            for top in range(0, height, s):
                for left in range(0, width, s):
                    box = [(r, c) for r in range(top, min(top + s, height)) for c in range(left, min(left + s, width))]
                    box = [r * width + c for r, c in box if here[r * width + c]]
                    if not box:
                        continue
                    center = sum(example[i] for i in box) / len(box)
                    logits = mixer.weight_proj(center).view(heads, k * k, k * k) / math.sqrt(d)
                    places = [(top + o // k - k // 2, left + o % k - k // 2) for o in range(k * k)]
                    cells = [r * width + c if 0 <= r < height and 0 <= c < width else None for r, c in places]
                    cells = [i if i is not None and here[i] else None for i in cells]
                    for receiving, target in enumerate(cells):
                        if target is None:
                            continue
                        parts = []
                        for h in range(heads):
                            weights = logits[h, receiving].softmax(-1)
                            seen = [weights[o] * v[i, h * d : (h + 1) * d] for o, i in enumerate(cells) if i is not None]
                            parts.append(sum(seen))
                        outputs[target] = outputs[target] + torch.cat(parts)
            examples.append(mixer.out_proj(torch.stack(outputs)) * here[:, None])
        return torch.stack(examples)

    return mix


MASK = torch.ones(2, 20, dtype=torch.bool)
MASK[0, 10:] = False
MASK[1, [3, 7, 8, 9]] = False


@pytest.mark.tier("T2", "mixer:outlook")
@pytest.mark.parametrize(
    ("options", "grid", "mask"),
    [
        ({}, (4, 5), None),
        ({"v_bias": True}, (4, 5), MASK),
        ({"stride": 1}, (3, 2), None),
        ({"window": 5, "stride": 3}, (4, 5), MASK),
        ({"window": 1, "stride": 2}, (5, 3), None),
        ({"stride": 4}, (1, 7), None),
    ],
    ids=str,
)
def test_equals_its_definition(options, grid, mask) -> None:
    mixer = build("outlook", 6, 2, **options)
    inputs = {} if mask is None else {"mask": mask}
    assert_defined_by(mixer, definition(mixer, grid, mask), tokens(math.prod(grid), 6), grid=grid, **inputs)


def test_without_logits_it_is_a_fixed_average() -> None:
    mixer = build("outlook", 6, 2)
    with torch.no_grad():
        mixer.weight_proj.weight.zero_()
        mixer.weight_proj.bias.zero_()
    first, second = (mixer.mixing_matrix(tokens(20, 6), grid=(4, 5)).detach() for _ in range(2))
    torch.testing.assert_close(first, second)
    # the cell between four windows receives a ninth of the sum of each
    corner = first[0, 0, 6].view(4, 5)
    assert corner[1, 1] == pytest.approx(4 / 9) and corner[2, 3] == pytest.approx(1 / 9)


def test_cells_that_are_padding_change_nothing() -> None:
    mixer, x = build("outlook", 6, 2), tokens(15, 6)
    larger = torch.full((2, 6, 7, 6), 1e3, dtype=x.dtype)
    larger[:, :3, :5] = x.detach().view(2, 3, 5, 6)
    mask = torch.zeros(2, 6, 7, dtype=torch.bool)
    mask[:, :3, :5] = True
    padded = mixer(larger.flatten(1, 2), grid=(6, 7), mask=mask.flatten(1)).view(2, 6, 7, 6)
    torch.testing.assert_close(padded[:, :3, :5], mixer(x, grid=(3, 5)).view(2, 3, 5, 6))


@settings(max_examples=10)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([1, 3, 5]), st.integers(1, 4))
def test_any_size(height, width, window, stride) -> None:
    mixer = build("outlook", 4, 2, window=window, stride=stride)
    x = torch.randn(1, height * width, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, grid=(height, width)), definition(mixer, (height, width))(x))


def test_folding_is_whole() -> None:
    weights = torch.randn(1, 2, 6, 9, 9, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(_fold, (weights, [4, 5], [3, 3], [2, 2]))
    kernels = torch.randn(1, 2, 20, 25, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(_unfold, (kernels, [4, 5], [3, 3], [2, 2]))
    with pytest.raises(ValueError, match="weights: expected"):
        fold_kernels(weights, grid=(4, 5), window=5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="window: expected an odd positive number, got 2"):
        create_mixer("outlook", 8, 2, window=2)
    with pytest.raises(ValueError, match="stride: expected a positive number, got 0"):
        create_mixer("outlook", 8, 2, stride=0)
    with pytest.raises(UnsupportedError, match="outlook"):
        create_mixer("outlook", 8, 2)(torch.randn(1, 4, 8))
