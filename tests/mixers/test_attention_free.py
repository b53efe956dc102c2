"""Pooling by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens


@pytest.mark.tier("T2", "mixer:pooling")
@pytest.mark.parametrize("grid", [(9,), (3, 4), (2, 3, 2)])
def test_pooling(grid) -> None:
    mixer = build("pooling", size=3)
    n = math.prod(grid)
    cells = torch.stack(torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij"), -1).reshape(n, -1)
    near = ((cells[:, None] - cells[None]).abs().amax(-1) <= 1).double()

    def definition(x: Tensor) -> Tensor:
        return (near @ x) / near.sum(-1, keepdim=True) - x

    assert_defined_by(mixer, definition, tokens(n), grid=grid)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pooling", {"size": 2}, "size"),
    ],
)
def test_bad_options(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, 3, **options)
