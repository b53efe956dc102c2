"""Attention over fixed slots by its definition: maps of each slot's own, and composite maps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from attnlab.channel_mixers import create_channel_mixer
from attnlab.mixers.parts.slot_linear import CompositeLinear, SlotLinear
from mixers.definition import assert_defined_by, build, tokens

L, DIM, HEADS = 4, 6, 2


def _own(layer: SlotLinear, x: Tensor) -> Tensor:
    rows = []
    for i in range(L):
        row = torch.stack([layer.weight[i] @ token for token in x[:, i]])
        rows.append(row if layer.bias is None else row + layer.bias[i])
    return torch.stack(rows, 1)


def _composite(layer: CompositeLinear, x: Tensor) -> Tensor:
    matrix = layer.up.weight if layer.down is None else layer.up.weight @ layer.down.weight  # (L out, L in)
    blocks = matrix.view(L, DIM, L, DIM)
    return torch.stack([sum(x[:, j] @ blocks[i, :, j].T for j in range(L)) for i in range(L)], 1)


def _project(layer, x: Tensor) -> Tensor:
    return (_own if isinstance(layer, SlotLinear) else _composite)(layer, x)


def _definition(mixer, x: Tensor, real: Tensor | None = None) -> Tensor:
    d = DIM // HEADS
    x = x if real is None else x * real[..., None]
    q, k, v = (_project(layer, x) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    out = []
    for b in range(x.shape[0]):
        keys = [j for j in range(L) if real is None or real[b, j]]
        for i in range(L):
            parts = []
            for h in range(HEADS):
                s = slice(h * d, (h + 1) * d)
                weights = [torch.exp((q[b, i, s] * k[b, j, s]).sum() / math.sqrt(d)) for j in keys]
                parts.append(sum(w * v[b, j, s] for w, j in zip(weights, keys, strict=True)) / sum(weights))
            out.append(torch.cat(parts))
    y = torch.stack(out).view(x.shape)
    y = y if mixer.out_proj is None else _own(mixer.out_proj, y)
    return y if real is None else y * real[..., None]


@pytest.mark.tier("T2", "mixer:heterogeneous")
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"out_proj": False}])
def test_heterogeneous(options):
    mixer = build("heterogeneous", DIM, HEADS, num_slots=L, **options)
    assert_defined_by(mixer, lambda x: _definition(mixer, x), tokens(L, DIM))


@pytest.mark.tier("T2", "mixer:hiformer")
@pytest.mark.parametrize(
    "options",
    [{"rank": 3}, {"rank": None}, {"rank": 5, "composite": "qkv", "out_proj": False}, {"composite": ["q"]}, {"composite": ()}],
)
def test_hiformer(options):
    mixer = build("hiformer", DIM, HEADS, num_slots=L, **options)
    assert_defined_by(mixer, lambda x: _definition(mixer, x), tokens(L, DIM))


@pytest.mark.parametrize("name", ["heterogeneous", "hiformer"])
def test_a_missing_field_takes_no_part(name):
    mixer = build(name, DIM, HEADS, num_slots=L)
    real = torch.tensor([[True, False, True, True], [False, True, True, False]])
    assert_defined_by(mixer, lambda x: _definition(mixer, x, real), tokens(L, DIM), mask=real)


def test_composite_keys_read_all_fields_and_others_do_not():
    for name, reaches in (("heterogeneous", False), ("hiformer", True)):
        mixer, x = build(name, DIM, HEADS, num_slots=L), tokens(L, DIM)
        (gradient,) = torch.autograd.grad(mixer.k_proj(x)[:, 0].sum(), x)
        assert (gradient[:, 1:].abs().max() > 0) == reaches
        (gradient,) = torch.autograd.grad(mixer.q_proj(x)[:, 0].sum(), x)
        assert gradient[:, 1:].abs().max() == 0


def test_parameters():
    def count(name: str, **options) -> int:
        return sum(p.numel() for p in create_mixer(name, 16, 4, num_slots=5, **options).parameters())

    assert count("heterogeneous") == 4 * 5 * 16**2
    assert count("hiformer", rank=3) == 2 * 5 * 16**2 + 2 * 2 * 5 * 16 * 3
    assert count("hiformer", rank=None, composite="qkv", out_proj=False) == 3 * (5 * 16) ** 2


@pytest.mark.tier("T2", "channel_mixer:slot_mlp")
def test_slot_mlp():
    mlp = create_channel_mixer("slot_mlp", DIM, num_slots=L, hidden=5, dtype=torch.float64)
    x = tokens(L, DIM)
    expected = []
    for i in range(L):
        up = x[:, i] @ mlp.up.weight[i].T + mlp.up.bias[i]
        up = up * 0.5 * (1 + torch.erf(up / 2**0.5))
        expected.append(up @ mlp.down.weight[i].T + mlp.down.bias[i])
    expected = torch.stack(expected, 1)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)
    direction, leaves = torch.randn_like(expected), [x, *mlp.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * direction).sum(), leaves) for y in (mlp(x), expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert create_channel_mixer("slot_mlp", DIM, num_slots=L).hidden == 4 * DIM
    with pytest.raises(ValueError, match="x: expected 4 tokens as num_slots says, got 3"):
        mlp(x[:, :3])
    with pytest.raises(ValueError, match="num_slots: expected a positive integer, got 0"):
        create_channel_mixer("slot_mlp", DIM, num_slots=0)


def test_a_slot_learns_for_itself():
    layer = SlotLinear(3, 4, 2, bias=True)
    layer(torch.randn(5, 3, 4))[:, 1].square().sum().backward()
    assert layer.weight.grad[1].abs().max() > 0 and layer.weight.grad[[0, 2]].abs().max() == 0
    linear = SlotLinear(1, 4, 2, bias=True)
    x = torch.randn(5, 1, 4)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight[0], linear.bias[0]))


def test_refusals():
    for options, message in (
        ({"num_slots": 0}, "num_slots: expected a positive integer, got 0"),
        ({"num_slots": 4, "composite": "kvx"}, "composite: expected some of 'q', 'k', 'v', got 'kvx'"),
        ({"num_slots": 4, "rank": 0}, "rank: expected a positive integer or None, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            create_mixer("hiformer", 8, 2, **options)
    with pytest.raises(ValueError, match="x: expected 4 tokens as num_slots says, got 5"):
        create_mixer("hiformer", 8, 2, num_slots=4)(torch.randn(1, 5, 8))
