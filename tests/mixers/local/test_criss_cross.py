"""Criss-cross attention cell by cell, what its passes reach, and its limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import UnsupportedError, create_mixer, record
from mixers.definition import assert_defined_by, build, split_heads, tokens


def cross(u: tuple[int, ...], cells: list[tuple[int, ...]]) -> list[int]:
    """The cells that differ from u along one axis at most; u is one of them, once."""
    return [i for i, s in enumerate(cells) if sum(a != b for a, b in zip(u, s, strict=True)) <= 1]


def definition(mixer, grid, mask=None):
    cells = list(itertools.product(*(range(n) for n in grid)))

    def one_pass(x: Tensor, here: Tensor) -> Tensor:
        parts = (split_heads(p(x), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        heads = []
        for q, k, v in zip(*parts, strict=True):
            rows = []
            for i, u in enumerate(cells):
                seen = [s for s in cross(u, cells) if here[s]]
                if not seen or not here[i]:
                    rows.append(torch.zeros_like(v[i]))
                    continue
                powers = torch.stack([torch.exp(q[i] @ k[s]) for s in seen])
                rows.append(sum(p / powers.sum() * v[s] for p, s in zip(powers, seen, strict=True)))
            heads.append(torch.stack(rows))
        return mixer.gamma * torch.cat(heads, -1) + x

    def mix(x: Tensor) -> Tensor:
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        examples = []
        for example, here in zip(x, real, strict=True):
            for _ in range(mixer.passes):
                example = one_pass(example, here)
            examples.append(example * here[:, None])
        return torch.stack(examples)

    return mix


MASK = torch.ones(2, 12, dtype=torch.bool)
MASK[0, 4:] = False  # whole lines, so that some cells see nothing
MASK[1, [0, 5, 7]] = False


@pytest.mark.tier("T2", "mixer:criss_cross")
@pytest.mark.parametrize(
    ("options", "heads", "grid", "mask"),
    [
        ({}, 1, (3, 4), None),
        ({"reduction": 2}, 2, (3, 4), MASK),
        ({"passes": 1, "reduction": 1}, 3, (4, 3), MASK),
        ({"passes": 3}, 1, (2, 3, 2), None),
        ({}, 1, (1, 7), None),
        ({}, 1, (5, 1), None),
    ],
    ids=str,
)
def test_equals_its_definition(options, heads, grid, mask) -> None:
    mixer = build("criss_cross", 6, heads, **options)
    inputs = {} if mask is None else {"mask": mask}
    assert_defined_by(mixer, definition(mixer, grid, mask), tokens(math.prod(grid), 6), grid=grid, **inputs)


@settings(max_examples=10)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=3), st.integers(1, 2))
def test_any_size(sides, passes) -> None:
    mixer = build("criss_cross", 4, 2, passes=passes)
    x = torch.randn(1, math.prod(sides), 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, grid=tuple(sides)), definition(mixer, tuple(sides))(x))


@pytest.mark.parametrize("grid", [(4, 5), (3, 2, 4)])
def test_what_the_passes_reach(grid) -> None:
    n = math.prod(grid)
    cells = list(itertools.product(*(range(side) for side in grid)))
    for passes in range(1, len(grid) + 1):
        mixer, x = build("criss_cross", 6, 1, passes=passes, reduction=1), tokens(n, 6, batch=1)
        jacobian = torch.autograd.functional.jacobian(lambda t, m=mixer: m(t, grid=grid).sum(-1), x).abs().sum(-1)[0, :, 0]
        apart = torch.tensor([[sum(a != b for a, b in zip(u, s, strict=True)) for s in cells] for u in cells])
        assert torch.equal(jacobian > 0, apart <= passes)


def test_one_axis_is_dense_attention() -> None:
    mixer, dense = build("criss_cross", 6, 2, passes=1, reduction=1), build("softmax", 6, 2, qkv_bias=True)
    dense.load_state_dict({**dense.state_dict(), **{k: v for k, v in mixer.state_dict().items() if k != "gamma"}})
    with torch.no_grad():
        dense.q_proj.weight.mul_(3**0.5)
        dense.q_proj.bias.mul_(3**0.5)
        dense.out_proj.weight.copy_(torch.eye(6) * mixer.gamma)
        dense.out_proj.bias.zero_()
    x = tokens(7, 6)
    torch.testing.assert_close(mixer(x, grid=(1, 7)), x + dense(x))


def test_a_fresh_layer_is_the_identity() -> None:
    x = torch.randn(2, 12, 8)
    assert torch.equal(create_mixer("criss_cross", 8)(x, grid=(3, 4)), x)


def test_the_composed_map_is_full() -> None:
    mixer, x = build("criss_cross", 6, 1), tokens(12, 6)
    with record(mixer) as tape:
        mixer(x, grid=(3, 4))
    assert (tape["attention"] == 0).sum() == 2 * 12 * 6
    assert (tape["composed"] > 0).all()
    torch.testing.assert_close(tape["composed"].sum(-1), torch.ones(2, 1, 12, dtype=x.dtype))


def test_refusals() -> None:
    for name in ("passes", "reduction"):
        with pytest.raises(ValueError, match=f"{name}: expected a positive number, got 0"):
            create_mixer("criss_cross", 8, **{name: 0})
    with pytest.raises(UnsupportedError, match="criss_cross"):
        create_mixer("criss_cross", 8)(torch.randn(1, 4, 8))
    with pytest.raises(UnsupportedError, match="mixing_matrix"):
        create_mixer("criss_cross", 8).mixing_matrix(torch.randn(1, 4, 8), grid=(2, 2))
