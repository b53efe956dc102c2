"""Union of experts by its definition: routing, filling up, ranks, attention a head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import UnsupportedError, check, create_mixer, record
from mixers.definition import assert_defined_by, build, split_heads, tokens

E, DIM, N = 4, 16, 7
MASK = torch.tensor([[True, True, False, True, True, True, False], [True] * N])


def _turned(x: Tensor, rank: int) -> Tensor:
    """A head's vector, its halves turned against each other by its rank."""
    half = len(x) // 2
    out = [None] * len(x)
    for t in range(half):
        angle = rank * 10000.0 ** (-2 * t / len(x))
        out[t] = x[t] * math.cos(angle) - x[half + t] * math.sin(angle)
        out[half + t] = x[half + t] * math.cos(angle) + x[t] * math.sin(angle)
    return torch.stack(out)


def _places(mixer, x: Tensor, mask: Tensor) -> list[list[list[int]]]:
    """For each example and head the places of its tokens."""
    places = [[[] for _ in range(E)] for _ in range(len(x))]
    for b in range(len(x)):
        for t in range(N):
            scores = (mixer.gate.weight @ x[b, t] + mixer.gate.bias).tolist()
            if mask[b, t]:
                for e in sorted(range(E), key=lambda e: -scores[e])[: mixer.num_active]:
                    places[b][e].append(t)
    if mixer.selection == "batch":
        longest = max(len(p) for heads in places for p in heads)
        for b in range(len(x)):
            for e in range(E):
                others = [t for t in range(N) if mask[b, t] and t not in places[b][e]]
                places[b][e] = sorted(places[b][e] + others[: longest - len(places[b][e])])
    return places


def _definition(mixer, x: Tensor, mask: Tensor) -> Tensor:
    x = x * mask[..., None]
    places = _places(mixer, x.detach(), mask)
    q, k, v = (split_heads(layer(x), E) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    out = [[torch.zeros(DIM, dtype=x.dtype) for _ in range(N)] for _ in range(len(x))]
    for b in range(len(x)):
        for e in range(E):
            taken = places[b][e]
            for i, t in enumerate(taken):
                seen = taken[: i + 1] if mixer.rank_causal else taken
                query = _turned(q[e][b, t], i)
                logits = [query @ _turned(k[e][b, s], j) / math.sqrt(DIM // E) for j, s in enumerate(seen)]
                weights = torch.softmax(torch.stack(logits), 0)
                o = sum(w * v[e][b, s] for w, s in zip(weights, seen, strict=True))
                columns = mixer.out_proj.weight[:, e * DIM // E : (e + 1) * DIM // E]
                out[b][t] = out[b][t] + columns @ o + mixer.expert_bias[e]
    return torch.stack([torch.stack(rows) for rows in out])


@pytest.mark.tier("T2", "mixer:union_of_experts")
@pytest.mark.parametrize(
    ("selection", "options"),
    [("batch", {}), ("batch", {"rank_causal": True, "num_active": 1}), ("token", {}), ("token", {"causal": True})],
)
@pytest.mark.parametrize("masked", [False, True])
def test_union_of_experts(selection, options, masked) -> None:
    mixer = build("union_of_experts", DIM, E, selection=selection, **options)
    mask = MASK if masked else torch.ones_like(MASK)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, mask), tokens(N, DIM), mask=mask if masked else None)


def test_by_token_keeps_the_contract_and_by_batch_refuses_causality() -> None:
    assert check("union_of_experts", options={"selection": "token"}).passed
    with pytest.raises(UnsupportedError, match="causal"):
        create_mixer("union_of_experts", DIM, E, causal=True)


@pytest.mark.parametrize("selection", ["batch", "token"])
def test_all_heads_active_is_multi_head_attention(selection) -> None:
    ours = build("union_of_experts", DIM, E, selection=selection, num_active=E, position="none")
    plain = create_mixer("softmax", DIM, E, qkv_bias=True).double()
    state = {key: value for key, value in ours.state_dict().items() if not key.startswith("gate")}
    state["out_proj.bias"] = state.pop("expert_bias").sum(0)
    plain.load_state_dict(state)
    x = tokens(N, DIM)
    torch.testing.assert_close(ours(x, mask=MASK), plain(x, mask=MASK), rtol=1e-12, atol=1e-12)


def test_a_position_with_a_bias_sees_ranks_too() -> None:
    ours = build("union_of_experts", DIM, E, selection="token", num_active=E, position="alibi")
    x = tokens(N, DIM)
    plain = create_mixer("softmax", DIM, E, qkv_bias=True, position="alibi").double()
    state = {key: value for key, value in ours.state_dict().items() if not key.startswith("gate")}
    state["out_proj.bias"] = state.pop("expert_bias").sum(0)
    plain.load_state_dict(state)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-12, atol=1e-12)


def test_held_fillers_are_taken() -> None:
    mixer = build("union_of_experts", DIM, E, num_active=1)
    x = tokens(N, DIM)
    fillers = torch.zeros(2, E, N, dtype=torch.bool)
    fillers[:, :, -1] = True
    mixer.hold(fillers)
    with record(mixer, only=["selected"]) as tape:
        mixer(x)
    assert tape["selected"][:, :, -1].all()
    with pytest.raises(ValueError, match="fillers"):
        mixer(x[:1])
    mixer.hold(None)
    with record(mixer, only=["selected"]) as tape:
        mixer(x)
    assert len(tape["selected"].sum(-1).unique()) == 1


@pytest.mark.parametrize("straight_through", [False, True])
def test_the_router_learns_straight_through_alone(straight_through) -> None:
    mixer = build("union_of_experts", DIM, E, straight_through=straight_through)
    plain = build("union_of_experts", DIM, E)
    plain.load_state_dict(mixer.state_dict())
    x = tokens(N, DIM)
    y = mixer(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(y.square().sum(), mixer.gate.weight, materialize_grads=True)
    assert bool(gradient.any()) == straight_through


def test_bad_options_are_named() -> None:
    for name, options in (("selection", {"selection": "head"}), ("num_active", {"num_active": 9})):
        with pytest.raises(ValueError, match=name):
            create_mixer("union_of_experts", DIM, E, **options)
    with pytest.raises(ValueError, match="rank_causal"):
        create_mixer("union_of_experts", DIM, E, selection="token", causal=True, rank_causal=False)
