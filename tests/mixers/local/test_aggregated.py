"""Aggregated attention by its definition, cell by cell, and what it hands to whoever listens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import UnsupportedError, create_mixer, record
from mixers.definition import assert_defined_by, build, tokens
from mixers.foveal_definition import foveal_heads

DIM, HEADS = 6, 2
MASKED = torch.ones(2, 20, dtype=torch.bool)
MASKED[0, :11] = False  # two whole pooled cells among them
MASKED[1, [3, 7, 19]] = False


@pytest.mark.tier("T2", "mixer:aggregated")
@pytest.mark.parametrize(
    ("options", "grid", "sides", "mask"),
    [
        ({"reduction": 2}, (4, 6), (2, 3), None),
        ({"pool": 2, "window": 5, "qkv_bias": False}, (5, 4), (2, 2), None),
        ({"pool": 3, "span": 9}, (5, 4), (3, 3), MASKED),
        ({"reduction": 3, "length_scale": False, "query_embedding": False}, (4, 5), (1, 1), None),
        ({"pool": 4, "positional_weights": False, "window": 1}, (2, 7), (2, 4), None),
        ({}, (1, 3), (1, 3), None),
    ],
    ids=["reduction", "pool", "masked", "bare", "no positional weights", "small"],
)
def test_aggregated(options, grid, sides, mask) -> None:
    mixer = build("aggregated", DIM, HEADS, **options)
    inputs = {} if mask is None else {"mask": mask}
    x = tokens(math.prod(grid), DIM)

    def definition(x: Tensor) -> Tensor:
        y = mixer.out_proj(foveal_heads(mixer, x, grid, sides, mask).flatten(2))
        return y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0.0)

    assert_defined_by(mixer, definition, x, grid=grid, **inputs)


def test_the_share_of_the_neighbourhood_is_recorded() -> None:
    mixer, x = build("aggregated", DIM, HEADS, pool=2), tokens(20, DIM)
    with torch.no_grad():
        mixer.window_bias.fill_(-1e4)
        with record(mixer) as tape:
            mixer(x, grid=(4, 5), mask=MASKED)
        assert tape["local_share"].shape == (2, HEADS, 20) and not tape["local_share"].any()
        mixer.window_bias.fill_(1e4)
        with record(mixer) as tape:
            mixer(x, grid=(4, 5))
        assert torch.equal(tape["local_share"], torch.ones(2, HEADS, 20, dtype=x.dtype))


def test_cost_of_a_reduction_is_quadratic() -> None:
    assert create_mixer("aggregated", 8, 2).supports.cost == 1.0
    assert create_mixer("aggregated", 8, 2, reduction=4).supports.cost == 2.0


def test_initial_values() -> None:
    mixer = create_mixer("aggregated", 48, 4)
    assert F.softplus(mixer.cosine.temperature).detach().flatten().tolist() == pytest.approx([1 / 0.24] * 4)
    assert not mixer.offset_bias.any()
    assert 0 < float(mixer.window_bias.detach().abs().max()) < 0.002
    assert mixer.q_proj.bias is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "window: expected an odd positive number, got 4"),
        ({"pool": 0}, "pool: expected a positive number, got 0"),
        ({"reduction": 0}, "reduction: expected a positive number, got 0"),
        ({"span": 0}, "span: expected a positive number, got 0"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("aggregated", DIM, HEADS, **options)


def test_sequences_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="aggregated"):
        create_mixer("aggregated", DIM, HEADS)(torch.randn(1, 4, DIM))
