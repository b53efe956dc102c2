"""Rank-augmented linear attention by its definition, pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer, record
from mixers.definition import assert_defined_by, build, tokens
from mixers.gated_grid_definition import DIM, HEADS, D, layer, turned

MASK = torch.tensor([[False] + [True] * 3 + [False] + [True] * 7, [True] * 9 + [False, True, False]])


def _head(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], real: list[int], *, augment: bool, rotary: bool) -> Tensor:
    n = len(real)
    mean = sum(q[i] for i in real) / n
    exps = {j: torch.exp(D**-0.5 * (k[j] * mean).sum()) for j in real}
    alpha = {j: n * e / sum(exps.values()) if augment else torch.ones((), dtype=q.dtype) for j, e in exps.items()}
    weighed = {j: alpha[j] * k[j] for j in real}
    turn = turned if rotary else lambda t, i, g: t
    rows = []
    for i in range(len(q)):
        z = 1 / ((q[i] * sum(weighed.values()) / n).sum() + 1e-6)
        products = [(turn(q[i], i, grid) * turn(weighed[j], j, grid)).sum() * v[j] / n for j in real]
        rows.append(z * sum(products))
    return torch.stack(rows)


@pytest.mark.tier("T2", "mixer:rala")
@pytest.mark.parametrize("options", [{}, {"augment": False, "gate": False}, {"rotary": False, "local_kernel": 0}], ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_on_a_grid(options, mask) -> None:
    mixer, grid = build("rala", DIM, HEADS, **options), (3, 4)
    given = {"augment": options.get("augment", True), "rotary": options.get("rotary", True)}
    assert_defined_by(
        mixer, lambda x: layer(mixer, x, grid, mask, lambda *head: _head(*head, **given)), tokens(12, DIM), grid=grid, mask=mask
    )


@pytest.mark.tier("T2", "mixer:rala")
@pytest.mark.parametrize("rank", [1, 2])
def test_on_a_sequence(rank) -> None:
    mixer, place = build("rala", DIM, HEADS, rank=rank), (7,) if rank == 1 else (1, 7)
    head = {"augment": True, "rotary": True}
    assert_defined_by(mixer, lambda x: layer(mixer, x, place, None, lambda *h: _head(*h, **head)), tokens(7, DIM))


def test_a_sequence_is_a_flat_volume() -> None:
    mixer, x = build("rala", 12, 2, rank=3), tokens(8, 12).detach()
    assert torch.equal(mixer(x), mixer(x, grid=(1, 1, 8)))
    assert not torch.allclose(mixer(x), mixer(x, grid=(2, 2, 2)))


def test_token_weights_have_mean_one() -> None:
    mixer, real = build("rala", DIM, HEADS), MASK
    with record(mixer, only=("token_weights",)) as tape:
        mixer(tokens(12, DIM), mask=real, grid=(3, 4))
    weights = tape["token_weights"].detach()
    assert float(weights.masked_select(~real[:, None]).abs().max()) == 0.0
    torch.testing.assert_close(weights.sum(-1), real.sum(-1, keepdim=True).expand(2, HEADS).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "rank: expected 1, 2 or 3"),
        ({"local_kernel": 4}, "local_kernel: expected an odd number"),
        ({"position": "rotary"}, "position: expected 'none'"),
        ({"num_kv_heads": 1}, "num_kv_heads: expected 2"),
        ({"head_dim": 6}, "head_dim: expected a multiple of 4"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("rala", DIM, HEADS, **options)
