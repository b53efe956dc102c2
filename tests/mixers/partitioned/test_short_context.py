"""The short-term context entity by entity and frame by frame."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens


def definition(mixer, grid: tuple[int, int]):
    entities, reach = mixer.entities, mixer.conv.kernel_size[1] // 2

    def mix(x: Tensor) -> Tensor:
        table = x.unflatten(1, grid)
        rows = []
        for s in range(grid[0]):
            group, own = divmod(s, entities)
            for t in range(grid[1]):
                outputs = []
                for d in range(mixer.dim):
                    channel = d * entities + own
                    total = mixer.conv.bias[channel]
                    for other in range(min(entities, grid[0] - group * entities)):
                        for step in range(-reach, reach + 1):
                            if 0 <= t + step < grid[1]:
                                seen = table[:, group * entities + other, t + step]
                                total = total + seen @ mixer.conv.weight[channel, :, other, step + reach]
                    outputs.append(total.expand(len(x)))
                u = torch.stack(outputs, dim=-1)
                u = (u - u.mean(-1, keepdim=True)) / torch.sqrt(u.var(-1, unbiased=False, keepdim=True) + 1e-5)
                hidden = mixer.up(u * mixer.norm.weight + mixer.norm.bias)
                rows.append(mixer.down(0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))))
        return torch.stack(rows, dim=1)

    return mix


@pytest.mark.tier("T2", "mixer:short_context")
@pytest.mark.parametrize(
    ("grid", "options"),
    [((3, 5), {}), ((3, 9), {"kernel_size": 5, "hidden": 5}), ((5, 4), {"entities": 2, "kernel_size": 3}), ((1, 3), {})],
    ids=str,
)
def test_equals_its_definition(grid, options) -> None:
    mixer = build("short_context", 4, 1, **options)
    assert_defined_by(mixer, definition(mixer, grid), tokens(grid[0] * grid[1], 4), grid=grid)


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 4))
def test_groups_of_entities_do_not_see_each_other(rows, frames, entities) -> None:
    mixer = build("short_context", 4, 1, entities=entities, kernel_size=3)
    x = tokens(rows * frames, 4)
    groups = [
        mixer(part.flatten(1, 2), grid=(part.shape[1], frames)) for part in x.unflatten(1, (rows, frames)).split(entities, 1)
    ]
    torch.testing.assert_close(mixer(x, grid=(rows, frames)), torch.cat(groups, dim=1))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="entities: expected at least 1"):
        create_mixer("short_context", 8, entities=0)
    with pytest.raises(ValueError, match="kernel_size: expected an odd number"):
        create_mixer("short_context", 8, kernel_size=4)
    with pytest.raises(ValueError, match="hidden: expected at least 1"):
        create_mixer("short_context", 8, hidden=0)
