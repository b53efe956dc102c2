"""Short and long distance groups against loops over their cells."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnlab
from attnlab import create_mixer
from attnlab.core.errors import UnsupportedError
from mixers.definition import assert_defined_by, build, tokens
from mixers.group_definition import in_groups


def definition(mixer, grid, distance, g, interval, padding):
    if len(grid) > 1 and min(grid) <= g:
        g, distance = min(grid), "short"
    interval = interval if distance == "long" else 1
    before = [(-n % (g * interval)) // 2 if padding == "both" else 0 for n in grid]

    def group(head, cell):
        places = [c + b for c, b in zip(cell, before, strict=True)]
        return tuple((y // (g * interval), y % interval) for y in places)

    def bias(head, query, key):
        offsets = [(q - k) // interval for q, k in zip(query, key, strict=True)]
        return mixer.position.mlp(torch.tensor(offsets, dtype=torch.float64))[head]

    return in_groups(mixer, grid, group, None if mixer.position_name == "none" else bias)


def dynamic(rank):
    return {"position": "dynamic_mlp", "position_options": {"rank": rank, "hidden": 3}, "qkv_bias": True}


@pytest.mark.tier("T2", "mixer:long_short_distance")
@pytest.mark.parametrize("distance", ["short", "long"])
@pytest.mark.parametrize(
    ("grid", "g", "interval", "padding"),
    [((8, 4), 2, 2, "end"), ((5, 7), 2, 2, "both"), ((11,), 3, 2, "end"), ((3, 9), 3, 2, "end"), ((2, 3, 5), 1, 2, "both")],
    ids=str,
)
def test_equals_its_definition(grid, g, interval, padding, distance) -> None:
    options = {"distance": distance, "group": g, "interval": interval, "padding": padding}
    mixer = build("long_short_distance", 6, 2, **options, **dynamic(len(grid)))
    assert_defined_by(mixer, definition(mixer, grid, distance, g, interval, padding), tokens(math.prod(grid), 6), grid=grid)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_sizes(data) -> None:
    rank = data.draw(st.integers(1, 3))
    grid = data.draw(st.tuples(*[st.integers(1, {1: 17, 2: 6, 3: 3}[rank])] * rank))
    options = {
        "distance": data.draw(st.sampled_from(["short", "long"])),
        "group": data.draw(st.integers(1, 4)),
        "interval": data.draw(st.integers(1, 4)),
        "padding": "end" if rank == 1 else data.draw(st.sampled_from(["end", "both"])),
    }
    mixer = build("long_short_distance", 4, 1, **options)
    x = tokens(math.prod(grid), 4, 1)
    expected = definition(mixer, grid, *options.values())(x)
    torch.testing.assert_close(mixer(x, grid=grid), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("n", "options"), [(9, {"group": 9}), (7, {"group": 7, "distance": "long", "interval": 1})])
def test_one_group_is_dense_attention(n, options) -> None:
    mixer, dense = build("long_short_distance", **options), build("softmax")
    dense.load_state_dict(mixer.state_dict())
    x = tokens(n)
    torch.testing.assert_close(mixer(x), dense(x))


def test_both_distances_reach_the_whole_map() -> None:
    near, far = (build("long_short_distance", distance=d, group=3, interval=3) for d in ("short", "long"))
    x = tokens(81, batch=1)
    (gradient,) = torch.autograd.grad(far(near(x, grid=(9, 9)), grid=(9, 9))[0, 17].sum(), x)
    assert int((gradient[0].abs().sum(-1) > 0).sum()) == 81


@pytest.mark.parametrize("options", [{"distance": "long"}, {"distance": "long", "padding": "both"}])
def test_keeps_the_laws(options) -> None:
    attnlab.check("long_short_distance", options={"group": 2, **options}).raise_if_failed()


def test_refusals() -> None:
    for options, message in [
        ({"distance": "middle"}, "distance: expected one of"),
        ({"group": 0}, "group, interval: expected at least 1"),
        ({"interval": 0}, "group, interval: expected at least 1"),
        ({"padding": "start"}, "padding: expected one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            create_mixer("long_short_distance", 8, 2, **options)
    with pytest.raises(UnsupportedError, match="rank 1"):
        create_mixer("long_short_distance", 8, 2, padding="both")(torch.randn(1, 9, 8))
