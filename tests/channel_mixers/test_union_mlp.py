"""The MLP in experts by its definition, and its dense limit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attnlab.channel_mixers import create_channel_mixer

D = torch.float64


def _by_hand(mlp, x: torch.Tensor, route) -> torch.Tensor:
    width = mlp.hidden // mlp.num_experts
    rows = []
    for b in range(len(x)):
        for t in range(x.shape[1]):
            scores = route(b, t).tolist()
            out = mlp.down.bias
            for e in sorted(range(mlp.num_experts), key=lambda e: -scores[e])[: mlp.num_active]:
                part = slice(e * width, (e + 1) * width)
                hidden = F.gelu(mlp.up.weight[part] @ x[b, t] + mlp.up.bias[part])
                out = out + mlp.down.weight[:, part] @ hidden
            rows.append(out)
    return torch.stack(rows).view_as(x)


@pytest.mark.tier("T2", "channel_mixer:union_mlp")
@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_union_mlp(routing) -> None:
    options = {"num_tokens": 5} if routing == "sequence" else {}
    mlp = create_channel_mixer("union_mlp", 6, hidden=12, num_experts=4, num_active=2, routing=routing, dtype=D, **options)
    x = torch.randn(3, 5, 6, dtype=D, requires_grad=True)

    def route(b: int, t: int) -> torch.Tensor:
        return mlp.router(x[b, t] if routing == "token" else x[b].flatten())

    ours, theirs = mlp(x), _by_hand(mlp, x, route)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    leaves = [x, mlp.up.weight, mlp.down.weight]
    weight = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert mlp.per_token == (routing == "token")


def test_all_experts_are_the_mlp() -> None:
    mlp = create_channel_mixer("mlp", 6, dtype=D)
    union = create_channel_mixer("union_mlp", 6, num_experts=4, num_active=4, dtype=D)
    union.load_state_dict(mlp.state_dict(), strict=False)
    x = torch.randn(2, 3, 6, dtype=D)
    assert torch.equal(union(x), mlp(x))


def test_masked_tokens_do_not_route_a_sequence() -> None:
    union = create_channel_mixer("union_mlp", 6, routing="sequence", num_tokens=4, dtype=D)
    x, mask = torch.randn(2, 4, 6, dtype=D), torch.tensor([[True, True, True, False]] * 2)
    other = x.clone()
    other[:, 3] = 100.0
    assert torch.equal(union(x, mask=mask)[:, :3], union(other, mask=mask)[:, :3])


def test_the_router_learns_straight_through_alone() -> None:
    x = torch.randn(2, 3, 6, dtype=D)
    for learns in (False, True):
        union = create_channel_mixer("union_mlp", 6, straight_through=learns, dtype=D)
        (gradient,) = torch.autograd.grad(union(x).square().sum(), union.router.weight, materialize_grads=True)
        assert bool(gradient.any()) == learns


def test_bad_options_are_named() -> None:
    for name, options in (
        ("num_experts", {"num_experts": 5}),
        ("num_active", {"num_active": 5}),
        ("routing", {"routing": "patch"}),
        ("num_tokens", {"routing": "sequence"}),
        ("num_tokens", {"num_tokens": 4}),
    ):
        with pytest.raises(ValueError, match=name):
            create_channel_mixer("union_mlp", 6, **options)
