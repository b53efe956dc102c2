"""Aggregated attention by its definition, cell by cell, and what it hands to whoever listens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import UnsupportedError, create_mixer, record
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS = 6, 2
MASKED = torch.ones(2, 20, dtype=torch.bool)
MASKED[0, :11] = False  # two whole pooled cells among them
MASKED[1, [3, 7, 19]] = False


def _bins(side: int, cells: int) -> list[range]:
    return [range(j * side // cells, math.ceil((j + 1) * side / cells)) for j in range(cells)]


def _cpb(mixer, cell: tuple[int, int], bins: tuple[range, range], grid: tuple[int, int]) -> Tensor:
    """Offsets in float32 as the authors', and ours, are tabulated."""
    spans = [max((mixer.pool_bias.span or side) - 1, 1) for side in grid]
    delta = torch.tensor([at - (each[0] + each[-1]) / 2 for at, each in zip(cell, bins, strict=True)])
    delta = delta / torch.tensor(spans) * 8
    delta = delta.sign() * torch.log2(delta.abs() + 1) / math.log2(8)
    inner = (mixer.pool_bias.fc1.weight @ delta.double() + mixer.pool_bias.fc1.bias).relu()
    return mixer.pool_bias.fc2.weight @ inner + mixer.pool_bias.fc2.bias


def _definition(mixer, x: Tensor, grid: tuple[int, int], sides: tuple[int, int], mask: Tensor | None = None) -> Tensor:
    (height, width), d, r = grid, DIM // HEADS, mixer.window // 2
    real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    pools = [(rows, columns) for rows in _bins(height, sides[0]) for columns in _bins(width, sides[1])]
    examples = []
    for example, here in zip(x, real, strict=True):
        q, k, v = mixer.q_proj(example), mixer.k_proj(example), mixer.v_proj(example)
        local, far = F.gelu(mixer.pool_proj(example)), []
        for bins in pools:
            cells = [row * width + column for row in bins[0] for column in bins[1] if here[row * width + column]]
            if cells:
                far.append((bins, mixer.pool_norm(sum(local[c] for c in cells) / len(cells))))
        rows = []
        for i in range(height * width):
            if not here[i]:
                rows.append(torch.zeros_like(example[i]))
                continue
            near = []
            for o in range(mixer.window**2):
                row, column = i // width + o // mixer.window - r, i % width + o % mixer.window - r
                if 0 <= row < height and 0 <= column < width and here[row * width + column]:
                    near.append((o, row * width + column))
            parts = []
            for h in range(HEADS):
                s = slice(h * d, (h + 1) * d)
                unit = q[i, s] / q[i, s].norm()
                query = unit if mixer.cosine.query_embedding is None else unit + mixer.cosine.query_embedding[h, 0]
                query = query * torch.log(1 + torch.exp(mixer.cosine.temperature[h, 0, 0]))
                query = query * math.log(len(near) + len(far)) if mixer.cosine.length_scale else query
                powers = [torch.exp(query @ k[j, s] / k[j, s].norm() + mixer.window_bias[h, o]) for o, j in near]
                values = [v[j, s] for _, j in near]
                for bins, token in far:
                    key, bias = mixer.k_proj(token)[s], _cpb(mixer, (i // width, i % width), bins, grid)[h]
                    powers.append(torch.exp(query @ key / key.norm() + bias))
                    values.append(mixer.v_proj(token)[s])
                out = sum(p * value for p, value in zip(powers, values, strict=True)) / sum(powers)
                if mixer.offset_keys is not None:
                    for o, j in near:
                        out = out + (unit @ mixer.offset_keys[h, :, o] + mixer.offset_bias[h, 0, o]) * v[j, s]
                parts.append(out)
            rows.append(mixer.out_proj(torch.cat(parts)))
        examples.append(torch.stack(rows))
    return torch.stack(examples)


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
    assert_defined_by(mixer, lambda x: _definition(mixer, x, grid, sides, mask), x, grid=grid, **inputs)


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
