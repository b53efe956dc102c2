"""p-Laplacian message passing and the adapter around it, pair by pair from their equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import UnsupportedError, check, create_mixer
from attnlab.mixers.graph.p_laplacian import p_laplacian
from mixers.definition import assert_defined_by, build, split_heads, tokens


def _step(graph: Tensor, receivers: Tensor, senders: Tensor, p, mu, keep_self: bool) -> Tensor:
    """(n, m), (n, d), (m, d) to (n, d)."""
    rows = []
    for i in range(graph.shape[0]):
        weights = []
        for j in range(graph.shape[1]):
            same = keep_self and i == j
            difference = torch.zeros_like(senders[j]) if same else senders[j] - receivers[i]
            edge = torch.sqrt(graph[i, j] + 1e-8) * difference + 1e-8
            weights.append(graph[i, j] * torch.sqrt((edge**2).sum()) ** (p - 2))
        alpha = 1 / (sum(weights) + 2 * mu / p)
        row = sum(alpha * weight * sender for weight, sender in zip(weights, senders, strict=True))
        rows.append(row + (alpha * 2 * mu / p * receivers[i] if keep_self else 0))
    return torch.stack(rows)


def _definition(mixer, x: Tensor, context: Tensor | None = None) -> Tensor:
    source = x if context is None else context
    adapter, heads, n, m = mixer.adapter, mixer.num_heads, x.shape[1], source.shape[1]
    qs, ks = split_heads(mixer.q_proj(x), heads), split_heads(mixer.k_proj(source), heads)
    vs = split_heads(mixer.v_proj(source), heads)
    mu = adapter.mu * (2 + torch.tanh(adapter.mu_shift))
    outputs = []
    for e in range(x.shape[0]):
        maps = []
        for q, k in zip(qs, ks, strict=True):
            rows = []
            for i in range(n):
                stop = i + 1 if mixer.causal else m
                logits = torch.stack([(q[e, i] * k[e, j]).sum() / math.sqrt(q.shape[-1]) for j in range(stop)])
                rows.append(F.pad(logits.exp() / logits.exp().sum(), (0, m - stop)))
            maps.append(torch.stack(rows))
        y = mixer.out_proj(torch.cat([a @ v[e] for a, v in zip(maps, vs, strict=True)], -1))
        values, queries = torch.cat([v[e] for v in vs], -1), torch.cat([q[e] for q in qs], -1)
        if mixer.pooled_keys is not None:
            count = mixer.pooled_keys
            bounds = [(s * m // count, -(-(s + 1) * m // count)) for s in range(count)]
            values = torch.stack([values[a:b].mean(0) for a, b in bounds])
            maps = [torch.stack([a[:, lo:hi].mean(1) for lo, hi in bounds], 1) for a in maps]
        senders = adapter.down(mixer.out_proj(values)).chunk(heads, -1)
        receivers = adapter.down(mixer.out_proj(queries)).chunk(heads, -1) if mixer.graph == "bipartite" else senders
        passed = [_step(a, r, s, adapter.p, mu, mixer.graph == "self") for a, r, s in zip(maps, receivers, senders, strict=True)]
        outputs.append(y + adapter.up(F.gelu(adapter.gate(y)) * torch.cat(passed, -1)))
    return torch.stack(outputs)


@pytest.mark.tier("T2", "mixer:p_laplacian_adapter")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("graph", ["self", "bipartite"])
@pytest.mark.parametrize("p", [1.25, 2.0, 2.5])
def test_p_laplacian_adapter(p, graph, causal) -> None:
    mixer = build("p_laplacian_adapter", 8, 2, p=p, mu=0.3, reduction=2, graph=graph, causal=causal, learned_p=p == 1.25)
    assert_defined_by(mixer, lambda x: _definition(mixer, x), tokens(5, 8))


@pytest.mark.tier("T2", "mixer:p_laplacian_adapter")
@pytest.mark.parametrize("pooled_keys", [None, 3])
def test_cross_form(pooled_keys) -> None:
    options = {"reduction": 2, "graph": "bipartite", "pooled_keys": pooled_keys, "context_dim": 6}
    mixer, context = build("p_laplacian_adapter", 8, 2, **options), torch.randn(2, 7, 6, dtype=torch.float64)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, context), tokens(5, 8), context=context)


def test_p_two_is_the_normalised_graph() -> None:
    graph, features = torch.rand(1, 2, 4, 4, dtype=torch.float64), torch.randn(1, 2, 4, 3, dtype=torch.float64)
    expected = (graph @ features + 0.5 * features) / (graph.sum(-1, keepdim=True) + 0.5)
    torch.testing.assert_close(p_laplacian(graph, features, 2.0, 0.5), expected, rtol=1e-12, atol=0.0)


def test_below_two_self_edges_dominate_and_above_they_vanish() -> None:
    graph = torch.full((1, 1, 5, 5), 0.2, dtype=torch.float64)
    features = torch.randn(1, 1, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(p_laplacian(graph, features, 1.25, 0.1), features, rtol=0.0, atol=1e-4)
    moved = p_laplacian(graph, features, 3.0, 1e-9)
    off = torch.stack([(features - features[:, :, i : i + 1]).norm(dim=-1, keepdim=True) for i in range(5)], 2)
    expected = (off * features.unsqueeze(2)).sum(3) / off.sum(3)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"graph": "bipartite"}, {"graph": "bipartite", "pooled_keys": 3, "causal": False}, {"learned_p": True}], ids=str
)
def test_every_form_keeps_the_laws(options) -> None:
    report = check("p_laplacian_adapter", options=options)
    assert report.passed, str(report)


def test_a_context_needs_the_bipartite_graph() -> None:
    mixer, x = create_mixer("p_laplacian_adapter", 16, 2), torch.randn(1, 3, 16)
    with pytest.raises(UnsupportedError, match="context"):
        mixer(x, x)
    create_mixer("p_laplacian_adapter", 16, 2, graph="bipartite")(x, x)


def test_frozen_attention_leaves_the_adapter() -> None:
    mixer = create_mixer("p_laplacian_adapter", 16, 2, learned_p=True)
    mixer.freeze_attention()
    learned = {name for name, parameter in mixer.named_parameters() if parameter.requires_grad}
    assert learned == {f"adapter.{name}" for name, _ in mixer.adapter.named_parameters()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.5}, "p: "),
        ({"mu": 0.0}, "mu"),
        ({"reduction": 3}, "reduction"),
        ({"graph": "tree"}, "graph"),
        ({"pooled_keys": 4}, "pooled_keys"),
        ({"pooled_keys": 0, "graph": "bipartite"}, "pooled_keys"),
        ({"pooled_keys": 4, "graph": "bipartite", "causal": True}, "pooled_keys"),
        ({"num_kv_heads": 1}, "num_kv_heads"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("p_laplacian_adapter", 16, 2, **options)
