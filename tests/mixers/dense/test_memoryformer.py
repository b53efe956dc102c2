"""MemoryFormer's attention by its definition, and the lookup layer under it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from attnlab.mixers.parts.lookup_linear import LookupLinear, lookup_addresses
from mixers.definition import assert_defined_by, build, tokens
from mixers.lookup import looked_up


@pytest.mark.tier("T2", "mixer:memoryformer")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dim", "heads", "options"),
    [(16, 2, {"tau": 4}), (12, 3, {"tau": 3, "weight": "prob"}), (12, 3, {"tau": 4, "position": "none"})],
    ids=["quarter", "narrow", "no-position"],
)
def test_memoryformer(dim, heads, options, causal) -> None:
    mixer, width = build("memoryformer", dim, heads, causal=causal, **options), dim // heads

    def turned(head: Tensor, place: int) -> Tensor:
        """The first pair of channels by the angle of its position; heads of 4 or 8 channels turn one."""
        if "position" in options:
            return head
        cos, sin = torch.cos(torch.tensor(float(place)).double()), torch.sin(torch.tensor(float(place)).double())
        pair = torch.stack((head[0] * cos - head[1] * sin, head[1] * cos + head[0] * sin))
        return torch.cat((pair, head[2:]))

    def definition(x: Tensor) -> Tensor:
        out = []
        for example in x:
            layers = (mixer.q_lookup, mixer.k_lookup, mixer.v_lookup)
            q, k, v = ([looked_up(layer, token).split(width) for token in example] for layer in layers)
            rows = []
            for i in range(len(example)):
                seen = range(i + 1 if causal else len(example))
                parts = []
                for h in range(heads):
                    query = turned(q[i][h], i)
                    logits = torch.stack([query @ turned(k[j][h], j) / width**0.5 for j in seen])
                    parts.append(logits.softmax(0) @ torch.stack([v[j][h] for j in seen]))
                rows.append(torch.cat(parts))
            out.append(torch.stack(rows))
        return torch.stack(out)

    assert_defined_by(mixer, definition, tokens(7, dim))
    tau = options["tau"]
    assert sum(p.numel() for p in mixer.parameters()) == 3 * (dim // tau * 2**tau * dim + dim)


def test_narrow_heads_turn_one_pair_and_wide_ones_a_quarter() -> None:
    for width, pairs in ((2, 1), (3, 1), (4, 1), (6, 1), (7, 1), (8, 1), (16, 2), (32, 4)):
        mixer, x = create_mixer("memoryformer", 4 * width, 4, tau=4), torch.randn(1, 4, 6, width)
        moved = (mixer.position.encode(x, torch.arange(6)[None]) != x).any(0).any(0).any(0)
        assert int(moved.sum()) == 2 * pairs


@pytest.mark.parametrize("weight", ["l1_prob", "prob"])
def test_the_layer_is_its_equation(weight) -> None:
    layer = LookupLinear(12, 5, tau=3, weight=weight, dtype=torch.float64)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert_same_gradients(layer, layer(x), torch.stack([looked_up(layer, token) for token in x]), x)
    assert layer(x.view(2, 2, 12)).shape == (2, 2, 5)


def assert_same_gradients(layer, ours: Tensor, theirs: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(ours)
    leaves = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_the_probability_is_that_of_the_nearest_corner() -> None:
    z = torch.randn(5, 3, dtype=torch.float64)
    corners = torch.tensor([[1.0 if c >> (2 - j) & 1 else -1.0 for j in range(3)] for c in range(8)], dtype=torch.float64)
    share, row = (z @ corners.T).softmax(-1).max(-1)
    rows, weights = lookup_addresses(z, 3, "prob")
    assert torch.equal(rows[:, 0], row)
    torch.testing.assert_close(weights[:, 0], share, rtol=1e-12, atol=0.0)


def test_zero_counts_as_positive_and_has_no_gradient() -> None:
    x = torch.zeros(1, 4, requires_grad=True)
    rows, weights = lookup_addresses(x, 4, "prob")
    weights.sum().backward()
    assert int(rows) == 15
    assert weights.item() == pytest.approx(1 / 16)
    assert not x.grad.any()


def test_no_rows_are_laid_side_by_side() -> None:
    layer, x = LookupLinear(32, 64, tau=4), torch.randn(500, 32)
    seen = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Sizes():
        layer(x).sum().backward()
    assert max(seen) <= 500 * 64  # the rows of all chunks would be 8 times this


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 5}, "tau: expected a divisor of the 12 channels"),
        ({"tau": 0}, "tau: expected 1 to 16"),
        ({"tau": 4, "weight": "l2"}, "weight: expected one of"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("memoryformer", 12, 3, **options)
