"""Mixture-of-head attention by its definition, what its routers keep, and who uses which head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import UnsupportedError, create_mixer, record
from attnlab.mixers.heads.moh import to_mixture_of_heads
from attnlab.mixers.heads.routed_heads import head_usage
from mixers.definition import assert_defined_by, build, split_heads, tokens
from mixers.foveal_definition import foveal_heads


def _heads_by_hand(mixer, x: Tensor) -> list[Tensor]:
    """Each head's softmax attention, query by query."""
    n = x.shape[1]
    qs, ks, vs = (split_heads(proj(x), mixer.num_heads) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    outputs = []
    for q, k, v in zip(qs, ks, vs, strict=True):
        rows = []
        for i in range(n):
            keys = range(i + 1 if mixer.causal else n)
            powers = [torch.exp((q[:, i] * k[:, j]).sum(-1, keepdim=True) / math.sqrt(q.shape[-1])) for j in keys]
            rows.append(sum(p * v[:, j] for p, j in zip(powers, keys, strict=True)) / sum(powers))
        outputs.append(torch.stack(rows, dim=1))
    return outputs


def _gates(mixer, x: Tensor, shared: int, active: int) -> Tensor:
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
def test_linear_router(shared, active) -> None:
    mixer = build("moh", 8, 4, num_shared=shared, num_active=active, causal=True)

    def definition(x: Tensor) -> Tensor:
        gates = _gates(mixer, x, shared, active)
        heads = [out * gates[..., h, None] for h, out in enumerate(_heads_by_hand(mixer, x))]
        return mixer.out_proj(torch.cat(heads, -1))

    assert_defined_by(mixer, definition, tokens(5, 8))


@pytest.mark.tier("T2", "mixer:moh")
def test_query_norm_router() -> None:
    mixer = build("moh", 12, 6, num_shared=2, num_active=2, router="query_norm")

    def definition(x: Tensor) -> Tensor:
        norms = torch.stack([q.norm(dim=-1) for q in split_heads(mixer.q_proj(x), 6)[2:]], -1)
        scores = torch.softmax(norms / norms.std(dim=-1, keepdim=True), -1)
        chosen = F.one_hot(scores.topk(2, -1).indices, 4).sum(-2).to(x.dtype)
        gates = torch.cat((torch.ones_like(scores[..., :2]), chosen + scores - scores.detach()), -1)
        heads = [out * gates[..., h, None] for h, out in enumerate(_heads_by_hand(mixer, x))]
        return mixer.out_proj(torch.cat(heads, -1))

    assert_defined_by(mixer, definition, tokens(5, 12))


def test_counts_and_uniform_gates() -> None:
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


def test_balance_loss_is_least_for_an_even_load() -> None:
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
def test_refuses(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("moh", 12, 6, **options)


def test_a_query_norm_router_begins_with_three_quarters_of_the_heads() -> None:
    for heads in (8, 32):
        router = create_mixer("moh", 64, heads, router="query_norm").norm_router
        assert (router.num_shared, router.num_active) == (heads // 2, heads // 4)
    assert create_mixer("moh", 64, 8, router="query_norm", num_shared=2).norm_router.num_active == 3
    linear = create_mixer("moh", 64, 8).linear_router
    assert (linear.num_shared, linear.num_active) == (2, 3)


@pytest.mark.parametrize("router", ["linear", "query_norm"])
def test_without_a_choice_there_is_no_jump_and_without_routed_heads_no_router(router) -> None:
    assert create_mixer("moh", 12, 6, router=router).supports.discontinuous
    assert not create_mixer("moh", 12, 6, router=router, num_shared=2, num_active=4).supports.discontinuous
    mixer, x = build("moh", 12, 6, router=router, num_shared=6), tokens(5)
    with record(mixer) as tape:
        mixer(x)
    assert "gates" in tape and "router" not in tape and "balance_loss" not in tape


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "num_kv_heads": 2, "position": "rotary", "position_options": {"base": 100.0}, "qkv_bias": True},
        {"head_dim": 6, "qk_norm": "layer_norm", "out_bias": False, "context_dim": 10},
    ],
)
def test_a_converted_attention_with_all_heads_active_is_the_original(options) -> None:
    original = build("softmax", 16, 4, **options).eval()
    mixture = to_mixture_of_heads(original, num_active=2)
    mixture.load_state_dict(original.state_dict())
    assert mixture.norm_router.num_shared == 2 and not mixture.training
    x = tokens(7, 16)
    inputs = {"context": tokens(5, 10)} if "context_dim" in options else {}
    assert torch.equal(mixture(x, **inputs), original(x, **inputs))
    fewer = to_mixture_of_heads(original)
    assert fewer.norm_router.num_active == 1 and not torch.equal(fewer(x, **inputs), original(x, **inputs))


def test_a_converted_attention_streams_as_the_original() -> None:
    original = build("softmax", 16, 4, causal=True, position="rotary")
    mixture, x = to_mixture_of_heads(original, num_active=2), tokens(6, 16)
    state, expected = mixture.init_state(2), original.init_state(2)
    for piece in x.split(2, dim=1):
        y, state = mixture.extend(piece, state)
        z, expected = original.extend(piece, expected)
        assert torch.equal(y, z)


def test_only_plain_softmax_attention_is_converted() -> None:
    for name, options in (("sigmoid", {}), ("softmax", {"normalizer": "softmax_plus_one"})):
        with pytest.raises(ValueError, match=f"mixer: expected 'softmax' .*, got '{name}'"):
            to_mixture_of_heads(create_mixer(name, 12, 4, **options))
    with pytest.raises(ValueError, match="num_active"):
        to_mixture_of_heads(create_mixer("softmax", 12, 4), num_active=3)


def test_gradients_reach_the_scores_of_a_binary_gate() -> None:
    mixer, x = build("moh", 12, 6, router="query_norm"), tokens(5)
    with record(mixer) as tape:
        mixer(x)
    assert set(tape["gates"].detach().flatten().tolist()) == {0.0, 1.0}
    assert torch.autograd.grad(tape["gates"][..., 3].sum(), x)[0].abs().max() > 0


def test_head_usage_counts_real_tokens_by_class() -> None:
    gates = torch.tensor([[[1.0, 0.5, 0.0], [1.0, 0.0, 2.0]], [[1.0, 0.0, 0.1], [1.0, 3.0, 0.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    assert head_usage(gates).tolist() == [1.0, 0.5, 0.5]
    torch.testing.assert_close(head_usage(gates, mask), torch.tensor([1.0, 1 / 3, 2 / 3]))
    by_example = head_usage(gates, mask, torch.tensor([2, 0]))
    assert by_example.tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.5, 0.5]]
    by_token = head_usage(gates, mask, torch.tensor([[0, 1], [1, 0]]), num_classes=3)
    assert by_token.tolist() == [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


def test_head_usage_of_a_mixture_is_its_number_of_active_heads() -> None:
    mixer = build("moh", 12, 6, num_shared=2, num_active=2)
    with record(mixer, only=["gates"]) as tape:
        mixer(tokens(7))
    usage = head_usage(tape["gates"])
    assert float(usage.sum()) == pytest.approx(4.0) and usage[:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, r"mask: expected shape \(2, 2\), got \(2, 3\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels: expected shape"),
        ({"labels": torch.tensor([0, 4]), "num_classes": 3}, "labels: expected 0 to 2, got 0 to 4"),
    ],
)
def test_head_usage_refuses(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        head_usage(torch.ones(2, 2, 3), **options)


@pytest.mark.tier("T2", "mixer:moh_aggregated")
@pytest.mark.parametrize(("shared", "active"), [(1, 2), (0, 1), (3, 0)])
def test_aggregated_heads_by_the_gates_of_their_tokens(shared, active) -> None:
    mixer, grid = build("moh_aggregated", 12, 3, num_shared=shared, num_active=active, pool=2), (3, 4)

    def definition(x: Tensor) -> Tensor:
        heads = foveal_heads(mixer, x, grid, (2, 2)) * _gates(mixer, x, shared, active).unsqueeze(-1)
        return mixer.out_proj(heads.flatten(2))

    assert_defined_by(mixer, definition, tokens(12), grid=grid)


def test_aggregated_heads_keep_the_promises_of_their_attention() -> None:
    options = {"num_shared": 1, "num_active": 2, "reduction": 2}
    supports = create_mixer("moh_aggregated", 12, 4, **options).supports
    assert supports.discontinuous and supports.cost == 2.0 and supports.grid == {2}
    assert not create_mixer("moh_aggregated", 12, 3, **options).supports.discontinuous
    with pytest.raises(UnsupportedError, match="moh_aggregated"):
        create_mixer("moh_aggregated", 12, 4, causal=True)
    with pytest.raises(ValueError, match="num_shared"):
        create_mixer("moh_aggregated", 12, 4, num_shared=5)
