"""Focal modulation by its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens


@pytest.mark.tier("T2", "mixer:focal_modulation")
@pytest.mark.parametrize("options", [{}, {"levels": 3, "normalize": True, "post_norm": True}], ids=["default", "options"])
def test_focal_modulation(options) -> None:
    mixer, grid = build("focal_modulation", 6, 1, **options), (4, 5)
    levels = options.get("levels", 2)

    def definition(x: Tensor) -> Tensor:
        q, c, g = mixer.in_proj(x).split([6, 6, levels + 1], -1)
        c = c.transpose(1, 2).view(2, 6, *grid)
        gates = g.transpose(1, 2).view(2, levels + 1, *grid)
        context = torch.zeros_like(c)
        for level in range(levels):
            side = 3 + 2 * level
            c = F.gelu(F.conv2d(c, mixer.kernels[level], padding=side // 2, groups=6))
            context = context + gates[:, level : level + 1] * c
        context = context + gates[:, levels:] * F.gelu(c.mean((2, 3), keepdim=True))
        context = context / (levels + 1) if options.get("normalize") else context
        y = q * mixer.modulate(context.flatten(2).transpose(1, 2))
        return mixer.out_proj(
            F.layer_norm(y, (6,), mixer.post_norm.weight, mixer.post_norm.bias) if options.get("post_norm") else y
        )

    assert_defined_by(mixer, definition, tokens(20, 6), grid=grid)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("focal_modulation", {"window": 4}, "odd window"),
    ],
)
def test_bad_options(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, 3, **options)
