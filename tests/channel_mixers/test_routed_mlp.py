"""The routed feed-forward by its definition, its dense limit and its compiled form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnlab.channel_mixers import create_channel_mixer

D = torch.float64


def _by_hand(mlp, x: torch.Tensor) -> torch.Tensor:
    width, rows = mlp.hidden // mlp.num_blocks, []
    for token in x.flatten(0, 1):
        scores = torch.sigmoid(mlp.router(token)).tolist()
        out = torch.zeros_like(token)
        for g in sorted(range(mlp.num_blocks), key=lambda g: -scores[g])[: mlp.num_active]:
            part = slice(g * width, (g + 1) * width)
            hidden = mlp.up.weight[part] @ token + (0 if mlp.up.bias is None else mlp.up.bias[part])
            hidden = F.relu(hidden) if mlp.side is None else F.silu(hidden) * (mlp.side.weight[part] @ token)
            out = out + mlp.down.weight[:, part] @ hidden
        rows.append(out if mlp.down.bias is None else out + mlp.down.bias)
    return torch.stack(rows).view_as(x)


@pytest.mark.tier("T2", "channel_mixer:routed_mlp")
@pytest.mark.parametrize(("gated", "active"), [(False, 2), (False, 1), (True, 1), (True, None), (True, 4)])
def test_routed_mlp(gated, active) -> None:
    mlp = create_channel_mixer("routed_mlp", 6, hidden=12, gated=gated, num_active=active, dtype=D)
    x = torch.randn(3, 5, 6, dtype=D, requires_grad=True)
    ours, theirs = mlp(x), _by_hand(mlp, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    weight = torch.randn_like(ours)
    leaves = [x, *(p for name, p in mlp.named_parameters() if "router" not in name)]
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_form_for_compilers_is_the_same(monkeypatch) -> None:
    mlp = create_channel_mixer("routed_mlp", 6, dtype=D)
    x = torch.randn(2, 7, 6, dtype=D)
    routed = mlp(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(mlp(x), routed)


def test_all_blocks_are_the_perceptron() -> None:
    mlp = create_channel_mixer("routed_mlp", 6, num_active=4, activation="gelu", dtype=D)
    dense = create_channel_mixer("mlp", 6, dtype=D)
    dense.load_state_dict({name: value for name, value in mlp.state_dict().items() if "router" not in name})
    x = torch.randn(2, 3, 6, dtype=D)
    torch.testing.assert_close(mlp(x), dense(x))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_blocks: expected a divisor"):
        create_channel_mixer("routed_mlp", 6, hidden=10)
    with pytest.raises(ValueError, match="num_active: expected 1 to num_blocks"):
        create_channel_mixer("routed_mlp", 6, num_active=5)
    with pytest.raises(ValueError, match="activation: expected one of"):
        create_channel_mixer("routed_mlp", 6, activation="tan")
