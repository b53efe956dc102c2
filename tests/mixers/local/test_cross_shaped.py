"""Stripes against loops over their cells, LePE inside each stripe cell by cell, and what a token sees."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnlab
from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens
from mixers.group_definition import cells_of, in_groups


def definition(mixer, grid, stripe):
    first = (mixer.num_heads + 1) // 2

    def group(head, cell):
        return cell[1] // stripe if head < first else cell[0] // stripe

    def local(v: list[Tensor]) -> list[Tensor]:
        cells, found = cells_of(grid), []
        for h, values in enumerate(v):
            part, inner = (0, h) if h < first else (1, h - first)
            conv, d = mixer.lepe[part].conv, values.shape[-1]
            kernel, bias = (p[inner * d : (inner + 1) * d] for p in (conv.weight, conv.bias))
            reach = kernel.shape[-1] // 2
            rows = []
            for y, x in cells:
                total = bias.expand(values.shape[0], -1)
                for dy in range(-reach, reach + 1):
                    for dx in range(-reach, reach + 1):
                        other = (y + dy, x + dx)
                        if other in cells and group(h, other) == group(h, (y, x)):
                            weight = kernel[:, 0, dy + reach, dx + reach]
                            total = total + weight * values[:, cells.index(other)]
                rows.append(total)
            found.append(torch.stack(rows, dim=1))
        return found

    return in_groups(mixer, grid, group, local=None if mixer.lepe is None else local)


@pytest.mark.tier("T2", "mixer:cross_shaped")
@pytest.mark.parametrize(
    ("grid", "stripe", "heads", "lepe"),
    [((4, 4), 2, 2, True), ((3, 5), 2, 3, True), ((5, 4), 1, 4, True), ((2, 3), 7, 1, True), ((4, 6), 2, 2, False)],
    ids=str,
)
def test_equals_its_definition(grid, stripe, heads, lepe) -> None:
    mixer = build("cross_shaped", 12, heads, stripe=stripe, lepe=lepe, qkv_bias=True)
    assert_defined_by(mixer, definition(mixer, grid, stripe), tokens(math.prod(grid)), grid=grid)


@settings(max_examples=10, deadline=None)
@given(st.tuples(st.integers(1, 6), st.integers(1, 6)), st.integers(1, 4), st.integers(1, 3))
def test_any_sizes(grid, stripe, heads) -> None:
    mixer = build("cross_shaped", 6, heads, stripe=stripe)
    x = tokens(math.prod(grid), 6, 1)
    torch.testing.assert_close(mixer(x, grid=grid), definition(mixer, grid, stripe)(x), rtol=1e-9, atol=1e-12)


def test_a_stripe_as_wide_as_the_map_is_dense_attention() -> None:
    mixer, dense = build("cross_shaped", stripe=5, lepe=False), build("softmax")
    dense.load_state_dict(mixer.state_dict())
    x = tokens(20)
    torch.testing.assert_close(mixer(x, grid=(4, 5)), dense(x))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shared_keys_are_those_of_repeated_heads(kv_heads) -> None:
    grouped = build("cross_shaped", 8, 4, stripe=1, num_kv_heads=kv_heads)
    full = build("cross_shaped", 8, 4, stripe=1)
    state = dict(grouped.state_dict())
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].unflatten(0, (kv_heads, 2)).repeat_interleave(4 // kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x = tokens(12, 8)
    torch.testing.assert_close(grouped(x, grid=(3, 4)), full(x, grid=(3, 4)))


def test_one_layer_sees_a_cross_and_two_everything() -> None:
    mixer = build("cross_shaped", 8, 2, stripe=1, lepe=False)
    x = tokens(49, 8, 1)

    def seen(y: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(y[0, 24].sum(), x)
        return (gradient[0].abs().sum(-1) > 0).view(7, 7)

    cross = torch.zeros(7, 7, dtype=torch.bool)
    cross[3] = cross[:, 3] = True
    once = mixer(x, grid=(7, 7))
    assert torch.equal(seen(once), cross)
    assert bool(seen(mixer(mixer(x, grid=(7, 7)), grid=(7, 7))).all())


def test_keeps_the_laws_with_fewer_key_heads() -> None:
    attnlab.check("cross_shaped", options={"stripe": 1, "num_kv_heads": 2, "lepe": False}).raise_if_failed()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stripe": 0}, "stripe: expected at least 1"),
        ({"lepe_kernel": 2}, "kernel_size: expected an odd number"),
        ({"position": "alibi"}, "position: expected 'none' or 'rotary'"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected 1"),
    ],
)
def test_refusals(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("cross_shaped", 12, 6, **options)
