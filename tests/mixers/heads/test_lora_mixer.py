"""Routed low-rank experts on the projections of attention, by their definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attnlab import create_mixer, record
from attnlab.mixers.parts.routed_lora import LoraRouter, RoutedLora, known_tasks, preservation_loss, route_projections
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS, N, E = 6, 2, 4, 3


def _probabilities(router: LoraRouter, token: Tensor) -> list[Tensor]:
    powers = [torch.exp(row @ token) for row in router.proj.weight]
    return [power / sum(powers) for power in powers]


def _best(p: list[Tensor], k: int) -> list[int]:
    return sorted(range(len(p)), key=lambda e: -float(p[e].detach()))[:k]


def _weights(router: LoraRouter, token: Tensor, task: int | None) -> list[Tensor | float]:
    if task is not None:
        return [float(e == task) for e in range(router.num_experts)]
    p = _probabilities(router, token)
    if router.training or router.top_k is None:
        return p
    best = _best(p, router.top_k)
    total = sum(p[e] for e in best) if router.renormalize else 1.0
    return [p[e] / total if e in best else 0.0 for e in range(len(p))]


def _layer(layer: RoutedLora, x: Tensor, tasks: list[int | None]) -> Tensor:
    rows = []
    for example, task in zip(x, tasks, strict=True):
        for token in example:
            y = layer.weight @ token if layer.bias is None else layer.weight @ token + layer.bias
            for e, g in enumerate(_weights(layer.router, token, task)):
                y = y + layer.scale * g * (layer.lora_a[e] @ (layer.lora_b[e] @ token))
            rows.append(y)
    return torch.stack(rows).view(*x.shape[:2], -1)


def _joined(mixer, x: Tensor, tasks: list[int | None]) -> Tensor:
    """What goes into the output projection."""
    d = DIM // HEADS
    q, k, v = (_layer(layer, x, tasks) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    rows = []
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            parts = []
            for h in range(HEADS):
                s = slice(h * d, (h + 1) * d)
                keys = range(i + 1 if mixer.causal else x.shape[1])
                weights = [torch.exp((q[b, i, s] * k[b, j, s]).sum() / math.sqrt(d)) for j in keys]
                parts.append(sum(w * v[b, j, s] for w, j in zip(weights, keys, strict=True)) / sum(weights))
            rows.append(torch.cat(parts))
    return torch.stack(rows).view(x.shape)


def _definition(mixer, x: Tensor, tasks: list[int | None]) -> Tensor:
    return _layer(mixer.out_proj, _joined(mixer, x, tasks), tasks)


FREE: list[int | None] = [None, None]


@pytest.mark.tier("T2", "mixer:lora_mixer")
@pytest.mark.parametrize(
    ("training", "options"),
    [
        (True, {"top_k": 1}),
        (True, {"lora_alpha": 5, "causal": True}),
        (False, {"top_k": 2}),
        (False, {"top_k": 2, "renormalize": False, "qkv_bias": True}),
        (False, {"top_k": None, "causal": True}),
    ],
)
def test_equals_its_definition(training, options):
    mixer = build("lora_mixer", DIM, HEADS, num_experts=E, rank=2, **options).train(training)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, FREE), tokens(N, DIM))


@pytest.mark.tier("T2", "mixer:lora_mixer")
@pytest.mark.parametrize("training", [True, False])
def test_known_tasks_choose_the_expert(training):
    mixer = build("lora_mixer", DIM, HEADS, num_experts=E, rank=2).train(training)
    x = tokens(N, DIM)
    with known_tasks(mixer, torch.tensor([2, 0])):
        assert_defined_by(mixer, lambda x: _definition(mixer, x, [2, 0]), x)
        with pytest.raises(ValueError, match="tasks: expected one an example, 3, got 2"):
            mixer(tokens(N, DIM, batch=3))
    assert_defined_by(mixer, lambda x: _definition(mixer, x, FREE), x)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_loss_of_both_routers_counts_real_tokens(sign):
    mixer = build("lora_mixer", DIM, HEADS, num_experts=E, top_k=2, entropy_sign=sign, balance_weight=0.7, entropy_weight=0.3)
    x, mask = tokens(N, DIM), torch.tensor([[True, True, False, False], [True, True, True, True]])
    with record(mixer) as tape:
        mixer(x, mask=mask)
    shorter, whole = x[:1, :2], x[1:]
    inner = [*_joined(mixer, shorter, [None])[0], *_joined(mixer, whole, [None])[0]]
    expected = 0.0
    for router, seen in ((mixer.in_router, [*shorter[0], *whole[0]]), (mixer.out_router, inner)):
        rows = [[float(value.detach()) for value in _probabilities(router, token)] for token in seen]
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        chosen = [e for row in rows for e in sorted(range(E), key=lambda e, row=row: -row[e])[:2]]
        share = [chosen.count(e) / len(chosen) for e in range(E)]
        entropy = sum(-sum(p * math.log(p) for p in row) for row in rows) / len(rows)
        expected += 0.7 * sum(p * f for p, f in zip(mean, share, strict=True)) + sign * 0.3 * entropy
    assert float(tape["routing_loss"].detach()) == pytest.approx(expected, rel=1e-9)
    assert tape["router"].shape == (2, N, E)


def test_a_peaked_router_has_less_entropy_and_so_less_loss():
    router, x = LoraRouter(4, 3, top_k=1).double(), torch.eye(4, dtype=torch.float64)[None]
    with torch.no_grad():
        even = router.specialisation_loss(x, None, balance=0, entropy=1)
        router.proj.weight.mul_(1000)
        peaked = router.specialisation_loss(x, None, balance=0, entropy=1)
    assert float(even) == pytest.approx(math.log(3), rel=1e-2) and float(peaked) < 0.5 * float(even)


def test_any_attention_takes_experts_and_begins_as_it_was():
    mixer, x = build("softmax", 8, 4, num_kv_heads=2, qkv_bias=True, context_dim=6), tokens(5, 8)
    context, before = tokens(3, 6), dict(mixer.named_parameters())
    expected = mixer(x, context)
    inside, outside = route_projections(mixer, num_experts=2, rank=3, top_k=1)
    assert torch.equal(mixer(x, context), expected)
    assert all(dict(mixer.named_parameters())[name] is p for name, p in before.items())
    assert mixer.q_proj.router is inside and mixer.out_proj.router is outside
    assert mixer.k_proj.router is mixer.v_proj.router and mixer.k_proj.router is not inside
    assert isinstance(mixer.k_proj, nn.Linear) and mixer.k_proj.lora_a.shape == (2, 4, 3)


def test_only_the_router_learns_where_the_rest_is_frozen():
    mixer = create_mixer("lora_mixer", 8, 2, num_experts=3, rank=2)
    for name, parameter in mixer.named_parameters():
        parameter.requires_grad_("router" in name)
        if name.endswith("lora_a"):
            nn.init.normal_(parameter)
    mixer(torch.randn(2, 5, 8)).square().sum().backward()
    learned = {name for name, parameter in mixer.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert learned == {"q_proj.router.proj.weight", "out_proj.router.proj.weight"}


def test_preservation_is_the_squared_way_from_the_start():
    mixer = create_mixer("lora_mixer", 8, 2, num_experts=3, rank=2)
    start = {name: value.clone() for name, value in mixer.state_dict().items()}
    with torch.no_grad():
        mixer.q_proj.lora_a[1].add_(2.0)
        mixer.out_proj.lora_b[0].add_(1.0)
    sizes = (8 * 2 * 4.0, 2 * 8 * 1.0)
    assert preservation_loss(mixer, start, [1, 2]).item() == pytest.approx(sizes[0])
    assert preservation_loss(mixer, start, [0, 1]).item() == pytest.approx(sum(sizes))
    with pytest.raises(ValueError, match="module: expected layers with experts"):
        preservation_loss(nn.Linear(2, 2), {}, [0])


def test_initial_values():
    mixer = create_mixer("lora_mixer", 64, 4, num_experts=4, rank=16)
    assert not mixer.q_proj.lora_a.any()
    assert float(mixer.q_proj.lora_b.detach().std()) == pytest.approx(0.25, rel=0.05)
    assert float(mixer.in_router.proj.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_bad_options_are_named():
    for options, message in (
        ({"num_experts": 0}, "num_experts: expected a positive integer, got 0"),
        ({"num_experts": 2}, "top_k: expected 1 to num_experts=2, or None, got 3"),
        ({"rank": 0}, "rank: expected a positive integer, got 0"),
        ({"entropy_sign": 0}, "entropy_sign: expected 1 or -1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            create_mixer("lora_mixer", 8, 2, **options)
    with pytest.raises(ValueError, match="groups: expected names of linear layers, got 'w_proj'"):
        route_projections(create_mixer("softmax", 8, 2), [["w_proj"]])
