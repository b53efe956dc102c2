"""Mixture of attention by its definition, its losses, its caches, and what up-cycling keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import attnlab
from attnlab import UnsupportedError, create_mixer, record
from attnlab.mixers.heads.mixture import upcycle
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS, N = 6, 2, 5


def _gates(mixer, token: Tensor) -> list[Tensor]:
    logits = [row @ token for row in mixer.router.weight]
    total = sum(torch.exp(z) for z in logits)
    gates = [torch.exp(z) / total for z in logits]
    if mixer.num_active is not None:
        best = sorted(range(len(gates)), key=lambda i: -float(gates[i].detach()))[: mixer.num_active]
        kept = sum(gates[i] for i in best) if mixer.renormalize else 1.0
        gates = [g / kept if i in best else 0.0 * g for i, g in enumerate(gates)]
    return gates


def _attention(expert, x: Tensor, pairs: Tensor) -> Tensor:
    """Softmax attention of one expert row by row; ``pairs`` (b, h, n, n) says who may read whom."""
    d = DIM // HEADS
    q, k, v = expert.q_proj(x), expert.k_proj(x), expert.v_proj(x)
    rows = []
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            parts = []
            for h in range(HEADS):
                s = slice(h * d, (h + 1) * d)
                keys = [j for j in range(x.shape[1]) if pairs[b, h, i, j]]
                weights = [torch.exp((q[b, i, s] * k[b, j, s]).sum() / math.sqrt(d)) for j in keys]
                parts.append(sum(w * v[b, j, s] for w, j in zip(weights, keys, strict=True)) / sum(weights))
            rows.append(expert.out_proj(torch.cat(parts)))
    return torch.stack(rows).view(x.shape)


def _definition(mixer, x: Tensor, pairs: Tensor | None = None) -> Tensor:
    n = x.shape[1]
    everything = torch.ones(n, n, dtype=torch.bool)
    everything = (everything.tril() if mixer.causal else everything).expand(len(x), HEADS * len(mixer.experts), n, n)
    pairs = everything if pairs is None else everything & pairs
    outputs = [_attention(one, x, pairs[:, HEADS * i : HEADS * (i + 1)]) for i, one in enumerate(mixer.experts)]
    rows = []
    for b in range(x.shape[0]):
        for t in range(n):
            rows.append(sum(g * y[b, t] for g, y in zip(_gates(mixer, x[b, t]), outputs, strict=True)))
    return torch.stack(rows).view(x.shape)


@pytest.mark.tier("T2", "mixer:mixture_of_attention")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_active": 1}, {"num_active": 2}, {"num_active": 2, "renormalize": True}, {"shared_kv": True}],
)
def test_equals_its_definition(options, causal):
    mixer = build("mixture_of_attention", DIM, HEADS, num_experts=3, causal=causal, **options)
    assert_defined_by(mixer, lambda x: _definition(mixer, x), tokens(N, DIM))


def test_every_expert_has_its_own_heads_in_a_pair_mask():
    mixer = build("mixture_of_attention", DIM, HEADS, num_experts=2)
    pairs = torch.rand(2, 2 * HEADS, N, N) < 0.5
    pairs |= torch.eye(N, dtype=torch.bool)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, pairs), tokens(N, DIM), pair_mask=pairs)


@pytest.mark.parametrize("shared", [False, True])
def test_alike_experts_are_the_dense_layer(shared):
    dense, x = build("softmax", 8, 2, causal=True, qk_norm="layer_norm"), tokens(7, 8)
    mixture = upcycle([dense, dense, dense], shared_kv=shared)
    torch.testing.assert_close(mixture(x), dense(x), rtol=1e-12, atol=1e-12)
    assert not torch.equal(mixture.router.weight[0], mixture.router.weight[1])
    torch.testing.assert_close(upcycle([dense] * 3, num_active=2, renormalize=True)(x), dense(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        before = dense(x)
        mixture.experts[0].q_proj.weight.add_(1.0)
        assert torch.equal(dense(x), before)


def test_shared_projections_are_the_mean_of_the_given():
    given = [create_mixer("softmax", 8, 2, qkv_bias=True) for _ in range(3)]
    mixture = upcycle(given, shared_kv=True)
    for name in ("k_proj", "v_proj"):
        mean = torch.stack([getattr(one, name).weight for one in given]).mean(0)
        torch.testing.assert_close(getattr(mixture.experts[0], name).weight, mean)
        assert all(getattr(one, name) is getattr(mixture.experts[0], name) for one in mixture.experts)
    new, own = (create_mixer("mixture_of_attention", 8, 2, num_experts=3, shared_kv=shared) for shared in (True, False))
    count = [sum(p.numel() for p in mixer.parameters()) for mixer in (new, own)]
    assert count[1] - count[0] == 2 * 2 * 8 * 8


@pytest.mark.parametrize("shared", [False, True])
def test_the_cache_grows_by_the_experts_unless_shared(shared):
    mixer, x = build("mixture_of_attention", 8, 2, num_experts=3, causal=True, shared_kv=shared), tokens(6, 8)
    state, outputs = mixer.init_state(2), []
    for piece in x.split([1, 3, 2], dim=1):
        y, state = mixer.extend(piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x), rtol=1e-10, atol=1e-10)
    caches = [name for name in state if name.endswith("/k")]
    assert len(caches) == (1 if shared else 3) and state[caches[0]].shape[2] == 6


def test_losses_of_the_router():
    mixer, x = build("mixture_of_attention", DIM, HEADS, num_experts=3, num_active=2), tokens(N, DIM)
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    with record(mixer) as tape:
        mixer(x, mask=mask)
    scores, counts, squares = [0.0] * 3, [0] * 3, 0.0
    for token in x.detach()[mask]:
        logits = [float(row.detach() @ token) for row in mixer.router.weight]
        total = sum(map(math.exp, logits))
        squares += math.log(total) ** 2 / 7
        for i in sorted(range(3), key=lambda i: -logits[i])[:2]:
            counts[i] += 1
        scores = [s + math.exp(z) / total / 7 for s, z in zip(scores, logits, strict=True)]
    expected = 3 * sum(s * c / 7 for s, c in zip(scores, counts, strict=True))
    assert float(tape["balance_loss"].detach()) == pytest.approx(expected, rel=1e-9)
    assert float(tape["z_loss"].detach()) == pytest.approx(squares, rel=1e-9)
    assert ((tape["gates"] > 0).sum(-1) == 2).all()


@pytest.mark.parametrize(
    ("expert", "options"),
    [("moh", {"causal": True}), ("delta_net", {"causal": True}), ("mamba", {"causal": True}), ("pooling", {})],
)
def test_any_mixer_can_be_the_expert(expert, options):
    mixer, x = build("mixture_of_attention", 8, 2, num_experts=2, expert=expert, **options), tokens(6, 8)
    expected = sum(g[..., None] * one(x) for g, one in zip(mixer.router(x).softmax(-1).unbind(-1), mixer.experts, strict=True))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-12)
    assert mixer.supports == replace(attnlab.mixer_info(expert).supports, associative=False, dynamics=False)


def test_what_the_experts_cannot_the_mixture_refuses():
    with pytest.raises(UnsupportedError, match="causal=False"):
        create_mixer("mixture_of_attention", 8, 2, expert="delta_net")
    pooled = create_mixer("mixture_of_attention", 8, 2, expert="pooling")
    with pytest.raises(UnsupportedError, match="streaming"):
        pooled.init_state(1)
    with pytest.raises(UnsupportedError, match="context"):
        pooled(torch.randn(1, 4, 8), torch.randn(1, 3, 8))
    slots = create_mixer("mixture_of_attention", 8, 2, expert="hiformer", expert_options={"num_slots": 5})
    assert slots.fixed_tokens == 5 and slots(torch.randn(1, 5, 8)).shape == (1, 5, 8)
    with pytest.raises(ValueError, match="x: expected 5 tokens as num_slots says, got 4"):
        slots(torch.randn(1, 4, 8))
    with pytest.raises(UnsupportedError, match="packed"):
        slots.packed(torch.randn(10, 8), torch.tensor([0, 5, 10]))


def test_bad_options_are_named():
    for options, message in (
        ({"num_experts": 0}, "num_experts, experts: expected at least one, got 0"),
        ({"num_active": 5}, "num_active: expected 1 to num_experts=4, or None, got 5"),
        ({"expert": "delta_net", "causal": True, "shared_kv": True}, "shared_kv: expected experts .* got DeltaNet"),
    ):
        with pytest.raises(ValueError, match=message):
            create_mixer("mixture_of_attention", 8, 2, **options)
    with pytest.raises(ValueError, match="mixers: expected at least one, got none"):
        upcycle([])
    with pytest.raises(ValueError, match=r"experts: expected one mechanism.*'SigmoidAttention'"):
        upcycle([create_mixer("softmax", 8, 2), create_mixer("sigmoid", 8, 2)])
