"""Magnitude-aware linear attention by its definition, pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnlab
from attnlab import UnsupportedError, create_mixer
from mixers.definition import assert_defined_by, build, tokens
from mixers.gated_grid_definition import DIM, HEADS, D, layer, turned

MASK = torch.tensor([[False] + [True] * 3 + [False] + [True] * 7, [True] * 9 + [False, True, False]])


def _head(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], real: list[int], *, rotary: bool = True) -> Tensor:
    n, s, rows = len(real), D**-0.5, []
    turn = turned if rotary else lambda t, i, g: t
    for i in range(len(q)):
        z = s * (q[i] * sum(k[j] for j in real) / n).sum()
        weights = {j: s / n * (turn(q[i], i, grid) * turn(k[j], j, grid)).sum() * (1 + 1 / (z + 1e-6)) - z / n for j in real}
        rows.append(sum(w * v[j] for j, w in weights.items()))
    return torch.stack(rows)


@pytest.mark.tier("T2", "mixer:mala")
@pytest.mark.parametrize("options", [{}, {"gate": False, "local_kernel": 3}, {"rotary": False, "local_kernel": 0}], ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_on_a_grid(options, mask) -> None:
    mixer, grid, rotary = build("mala", DIM, HEADS, **options), (3, 4), options.get("rotary", True)
    assert_defined_by(
        mixer,
        lambda x: layer(mixer, x, grid, mask, lambda *head: _head(*head, rotary=rotary)),
        tokens(12, DIM),
        grid=grid,
        mask=mask,
    )


@pytest.mark.tier("T2", "mixer:mala")
@pytest.mark.parametrize("rank", [1, 2])
def test_on_a_sequence(rank) -> None:
    mixer, place = build("mala", DIM, HEADS, rank=rank), (7,) if rank == 1 else (1, 7)
    assert_defined_by(mixer, lambda x: layer(mixer, x, place, None, _head), tokens(7, DIM))


def test_the_contract_without_rotation() -> None:
    report = attnlab.check("mala", options={"rotary": False}, only=["cross*", "padding*", "empty*", "mixing*", "precision*"])
    assert report.passed, str(report)


def test_from_another_sequence() -> None:
    mixer, x, context = build("mala", DIM, HEADS, rotary=False), tokens(5, DIM).detach(), tokens(3, DIM).detach()
    sums = mixer.mixing_matrix(x, context).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)
    with pytest.raises(UnsupportedError, match="context"):
        build("mala", DIM, HEADS)(x, context)


def test_grids_beyond_the_rank_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="a grid of rank 2"):
        create_mixer("mala", DIM, HEADS, rank=1)(torch.randn(1, 6, DIM), grid=(2, 3))


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="head_dim: expected a multiple of 6"):
        create_mixer("mala", DIM, HEADS, rank=3)
