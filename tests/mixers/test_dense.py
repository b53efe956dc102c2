"""Softmax, sigmoid and mixture-of-head attention by their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer, record
from mixers.definition import assert_defined_by, build, split_heads, tokens


def _heads_by_hand(mixer, x: Tensor, weigh) -> list[Tensor]:
    """Each head's output; ``weigh(logits)`` turns the logits of one query over its keys into weights."""
    n, kv = x.shape[1], mixer.num_kv_heads
    qs = split_heads(mixer.q_proj(x), mixer.num_heads)
    ks, vs = split_heads(mixer.k_proj(x), kv), split_heads(mixer.v_proj(x), kv)
    outputs = []
    for h, q in enumerate(qs):
        k, v = ks[h * kv // mixer.num_heads], vs[h * kv // mixer.num_heads]
        rows = []
        for i in range(n):
            stop = i + 1 if mixer.causal else n
            logits = torch.stack([(q[:, i] * k[:, j]).sum(-1) for j in range(stop)], dim=-1) / math.sqrt(q.shape[-1])
            weights = weigh(logits)
            rows.append(sum(weights[:, j, None] * v[:, j] for j in range(stop)))
        outputs.append(torch.stack(rows, dim=1))
    return outputs


@pytest.mark.tier("T2", "mixer:softmax")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_softmax(causal, kv) -> None:
    mixer = build("softmax", 8, 4, causal=causal, num_kv_heads=kv, qkv_bias=True)
    weigh = lambda logits: logits.exp() / logits.exp().sum(-1, keepdim=True)  # noqa: E731
    assert_defined_by(mixer, lambda x: mixer.out_proj(torch.cat(_heads_by_hand(mixer, x, weigh), -1)), tokens(6, 8))


@pytest.mark.tier("T2", "mixer:sigmoid")
@pytest.mark.parametrize(("causal", "bias"), [(False, "log_count"), (True, "log_count"), (True, -3.0)])
def test_sigmoid(causal, bias) -> None:
    mixer = build("sigmoid", 8, 2, causal=causal, logit_bias=bias, log_temperature=0.3)

    def weigh(logits: Tensor) -> Tensor:
        shift = -math.log(logits.shape[-1]) if bias == "log_count" else bias
        return 1.0 / (1.0 + torch.exp(-(logits * math.exp(0.3) + shift)))

    assert_defined_by(mixer, lambda x: mixer.out_proj(torch.cat(_heads_by_hand(mixer, x, weigh), -1)), tokens(6, 8))


def test_sigmoid_norm_at_initialisation_does_not_grow_with_length() -> None:
    torch.manual_seed(0)
    free, tied = (create_mixer("sigmoid", 64, 4, logit_bias=bias) for bias in (0.0, "log_count"))
    short, long = torch.randn(1, 16, 64), torch.randn(1, 512, 64)

    def size(mixer, x) -> float:
        return float(mixer.mixing_matrix(x).detach().sum(-1).mean())

    assert size(free, long) > 25 * size(free, short)
    assert size(tied, long) == pytest.approx(size(tied, short), rel=0.3)


def _moh_gates(mixer, x: Tensor, shared: int, active: int) -> Tensor:
    """Gates token by token from the card: top-k by sorting, balance, shared softmax."""
    router, heads = mixer.linear_router, mixer.num_heads
    gates = []
    for token in x.flatten(0, 1):
        row = [torch.zeros((), dtype=x.dtype) for _ in range(heads)]
        balance = torch.ones(2, dtype=x.dtype)
        if shared and active:
            balance = 2.0 * torch.softmax(router.balance.weight @ token, 0)
        if shared:
            s = torch.softmax(router.shared.weight @ token, 0) if shared > 1 else torch.ones(1, dtype=x.dtype)
            for i in range(shared):
                row[i] = shared * s[i] * balance[0]
        if active:
            p = torch.softmax(router.routed.weight @ token, 0)
            best = sorted(range(heads - shared), key=lambda i: -float(p[i].detach()))[:active]
            total = sum(p[i] for i in best)
            for i in best:
                row[shared + i] = active * p[i] / total * balance[1]
        gates.append(torch.stack(row))
    return torch.stack(gates).view(*x.shape[:2], heads)


@pytest.mark.tier("T2", "mixer:moh")
@pytest.mark.parametrize(("shared", "active"), [(2, 1), (1, 2), (0, 2), (4, 0)])
def test_moh_linear_router(shared, active) -> None:
    mixer = build("moh", 8, 4, num_shared=shared, num_active=active, causal=True)
    softmax = lambda logits: torch.softmax(logits, -1)  # noqa: E731

    def definition(x: Tensor) -> Tensor:
        gates = _moh_gates(mixer, x, shared, active)
        heads = [out * gates[..., h, None] for h, out in enumerate(_heads_by_hand(mixer, x, softmax))]
        return mixer.out_proj(torch.cat(heads, -1))

    assert_defined_by(mixer, definition, tokens(5, 8))


@pytest.mark.tier("T2", "mixer:moh")
def test_moh_query_norm_router() -> None:
    mixer = build("moh", 12, 6, num_shared=2, num_active=2, router="query_norm")
    softmax = lambda logits: torch.softmax(logits, -1)  # noqa: E731

    def definition(x: Tensor) -> Tensor:
        norms = torch.stack([q.norm(dim=-1) for q in split_heads(mixer.q_proj(x), 6)[2:]], -1)
        scores = torch.softmax(norms / norms.std(dim=-1, keepdim=True), -1)
        chosen = F.one_hot(scores.topk(2, -1).indices, 4).sum(-2).to(x.dtype)
        gates = torch.cat((torch.ones_like(scores[..., :2]), chosen + scores - scores.detach()), -1)
        heads = [out * gates[..., h, None] for h, out in enumerate(_heads_by_hand(mixer, x, softmax))]
        return mixer.out_proj(torch.cat(heads, -1))

    assert_defined_by(mixer, definition, tokens(5, 12))


def test_moh_counts_and_uniform_gates() -> None:
    mixer = build("moh", 12, 6, num_shared=2, num_active=2)
    x = tokens(7)
    with record(mixer) as tape:
        mixer(x)
    assert ((tape["gates"] > 0).sum(-1) == 4).all()
    with torch.no_grad():
        for layer in (mixer.linear_router.routed, mixer.linear_router.shared, mixer.linear_router.balance):
            layer.weight.zero_()
    plain = build("moh", 12, 6, num_shared=6, num_active=0)
    with torch.no_grad():
        plain.linear_router.shared.weight.zero_()
    everything = build("softmax", 12, 6)
    everything.load_state_dict({k: v for k, v in plain.state_dict().items() if "router" not in k})
    torch.testing.assert_close(plain(x), everything(x))


def test_moh_balance_loss_is_least_for_an_even_load() -> None:
    mixer = build("moh", 12, 6, num_shared=2, num_active=2)
    x = tokens(50)
    with record(mixer, only=["balance_loss"]) as tape:
        mixer(x)
        even = float(tape["balance_loss"].detach())
        with torch.no_grad():
            mixer.linear_router.routed.weight[0] += 5 * x[0].mean(0)
        mixer(x)
    assert even > 0
    assert float(tape["balance_loss"].detach()) != even


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shared": 9}, "num_shared"),
        ({"num_shared": 2, "num_active": 7}, "num_active"),
        ({"router": "linnear"}, "router"),
        ({"score": "cos"}, "score"),
    ],
)
def test_moh_refuses(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("moh", 12, 6, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("softmax", {"num_kv_heads": 4}, "num_kv_heads"),
        ("softmax", {"qk_norm": "batch"}, "qk_norm"),
        ("sigmoid", {"logit_bias": "learned"}, "logit_bias"),
    ],
)
def test_dense_refuses(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, 6, **options)
