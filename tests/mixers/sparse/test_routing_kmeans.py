"""Routing attention against its equations written out cluster by cluster, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer, record
from attnlab.core.masks import Masks
from mixers.definition import assert_defined_by, build, split_heads, tokens


def normal(x: Tensor, form: str) -> Tensor:
    if form == "port":
        return x / x.norm()
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()


def members(mixer, products_q, products_k, real):
    """For each query its key lists, one a cluster that it is in; what is compared are numbers."""
    w, clusters = mixer.window, range(len(mixer.centroids.means[0]))
    found: dict[int, list] = {i: [] for i in real}
    if not mixer.causal:
        for c in clusters:
            q, k = (sorted(sorted(real, key=lambda i: -float(p[i][c]))[:w]) for p in (products_q, products_k))
            for i in q:
                found[i].append((c, [j for j in k if not mixer.hide_later or j <= i]))
        return found
    best_q, best_k = ({i: max(clusters, key=lambda c: float(p[i][c])) for i in real} for p in (products_q, products_k))
    for c in clusters:
        line: list[tuple[int, str]] = []
        for i in real:
            if mixer.shared_qk:
                line += [(i, "both")] if best_q[i] == c else []
            else:
                line += ([(i, "key")] if best_k[i] == c else []) + ([(i, "query")] if best_q[i] == c else [])
        for place, (i, what) in enumerate(line):
            if what != "key":
                start = max(place // w - 1, 0) * w
                found[i].append((c, [j for j, kind in line[start : place + 1] if kind != "query"]))
    return found


def definition(mixer, mask=None):
    form = mixer.form

    def attend(x: Tensor) -> Tensor:
        heads, n = mixer.num_heads, x.shape[1]
        q, v = (split_heads(p(x), heads) for p in (mixer.q_proj, mixer.v_proj))
        k = q if mixer.shared_qk else split_heads(mixer.k_proj(x), heads)
        out = []
        for b in range(len(x)):
            real = [i for i in range(n) if mask is None or mask[b, i]]
            columns = []
            for h in range(heads):
                qs, ks = ({i: normal(t[h][b, i], form) for i in real} for t in (q, k))
                products = [{i: mixer.centroids.means[h] @ t[i].detach() for i in real} for t in (qs, ks)]
                found = members(mixer, *products, real)
                scale = 1.0
                if form == "port":
                    qs, ks = ({i: t[h][b, i] for i in real} for t in (q, k))
                    scale = 1 / math.sqrt(x.shape[2] // heads)
                rows = []
                for i in range(n):
                    parts = []
                    for c, keys in found.get(i, []):
                        logits, values = [], []
                        for m in range(mixer.num_memory):
                            logits.append(qs[i] @ mixer.memory_keys[h, c, m] * scale)
                            values.append(mixer.memory_values[h, c, m])
                        for j in keys:
                            last = mixer.shared_qk and form == "port" and i == j
                            logits.append(qs[i] @ ks[j] * scale - (5e4 if last else 0.0))
                            values.append(v[h][b, j])
                        parts.append(
                            torch.stack(logits).softmax(0) @ torch.stack(values) if logits else torch.zeros_like(q[h][b, i])
                        )
                    total = torch.stack(parts).sum(0) if parts else torch.zeros_like(q[h][b, i])
                    rows.append(total if mixer.causal else total / (len(parts) + (1e-2 if form == "authors" else 1e-5)))
                columns.append(torch.stack(rows))
            out.append(torch.cat(columns, dim=-1))
        y = mixer.out_proj(torch.stack(out))
        return y if mask is None else y * mask.unsqueeze(-1)

    return attend


OPTIONS = [
    {},
    {"form": "port", "num_memory": 2},
    {"shared_qk": True},
    {"shared_qk": True, "form": "port"},
]


@pytest.mark.tier("T2", "mixer:routing_kmeans")
@pytest.mark.parametrize("order", [{}, {"causal": True}, {"hide_later": True}], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_its_definition(options, order) -> None:
    mixer = build("routing_kmeans", 12, 3, num_clusters=3, window=4, **options, **order).eval()
    assert_defined_by(mixer, definition(mixer), tokens(13, 12))


@pytest.mark.tier("T2", "mixer:routing_kmeans")
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 11), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.sampled_from(OPTIONS), st.integers(0, 99))
def test_any_sizes_and_masks(n, clusters, window, causal, options, seed) -> None:
    mixer = build("routing_kmeans", 6, 2, num_clusters=clusters, window=window, causal=causal, **options).eval()
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, n, generator=generator) < 0.7
    x = torch.randn(2, n, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, mask=mask), definition(mixer, mask)(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_is_dense_attention(causal) -> None:
    mixer = build("routing_kmeans", num_clusters=1, window=40, causal=causal, form="port").eval()
    dense = build("softmax", causal=causal)
    dense.load_state_dict({name: value for name, value in mixer.state_dict().items() if "centroids" not in name})
    x = tokens(17)
    heads = mixer.attend(*mixer.project(x), Masks(), None)
    torch.testing.assert_close(heads * (1.0 if causal else 1 + 1e-5), dense.attend(*dense.project(x), Masks(), None))


def test_the_published_choice_looks_ahead_and_the_causal_one_does_not() -> None:
    torch.manual_seed(0)
    looks, causal = (
        build("routing_kmeans", num_clusters=3, window=4, **order).eval() for order in ({"hide_later": True}, {"causal": True})
    )
    x = tokens(20).detach()
    other = x.clone()
    other[:, 12:] = torch.randn(2, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(causal(x)[:, :12], causal(other)[:, :12])
    assert float((looks(x) - looks(other))[:, :12].detach().abs().max()) > 1e-3


def test_centroids_follow_in_training_alone() -> None:
    mixer = build("routing_kmeans", num_clusters=2, window=3, decay=0.5)
    means = mixer.centroids.means.clone()
    x = tokens(8).detach()
    mixer.eval()(x)
    torch.testing.assert_close(mixer.centroids.means, means)
    mask = torch.arange(8).expand(2, -1) < 5
    counts = mixer.centroids.counts.clone()
    with record(mixer, only=["commitment_loss"]) as tape:
        mixer.train()(x, mask=mask)
    assert float((mixer.centroids.means - means).abs().max()) > 1e-3
    # twice halved, by queries and by keys, and 10 real tokens given each time
    torch.testing.assert_close(mixer.centroids.counts.sum(-1), counts.sum(-1) / 4 + 10 / 4 + 10 / 2)
    assert tape["commitment_loss"].requires_grad


def test_clusters_of_synthetic_data_are_found() -> None:
    generator = torch.Generator().manual_seed(1)
    mixer = create_mixer("routing_kmeans", 16, 1, num_clusters=4, window=8, decay=0.8, generator=generator, shared_qk=True)
    centers = 3 * torch.randn(4, 16, generator=generator)
    labels = torch.arange(64) % 4
    with torch.no_grad():
        mixer.q_proj.weight.copy_(torch.eye(16))
        for _ in range(30):
            mixer((centers[labels] + 0.3 * torch.randn(64, 16, generator=generator))[None])
        products = mixer.centroids.similarity(mixer.centroids.normalized(centers)[None, None])
    assert len(set(products.argmax(-1).flatten().tolist())) >= 3


def test_the_generator_draws_the_centroids() -> None:
    one, two = (create_mixer("routing_kmeans", 8, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(one.centroids.means, two.centroids.means)
    assert {"centroids.means", "centroids.counts", "centroids.sums"} <= set(one.state_dict())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_clusters: expected at least 1"):
        create_mixer("routing_kmeans", 8, 2, num_clusters=0)
    with pytest.raises(ValueError, match="form: expected one of"):
        create_mixer("routing_kmeans", 8, 2, form="tf")
    with pytest.raises(ValueError, match="hide_later: expected False with causal=True"):
        create_mixer("routing_kmeans", 8, 2, causal=True, hide_later=True)
    with pytest.raises(ValueError, match="num_kv_heads"):
        create_mixer("routing_kmeans", 8, 2, num_kv_heads=1)
    with pytest.raises(ValueError, match="decay: expected a number from 0 to 1"):
        create_mixer("routing_kmeans", 8, 2, decay=2)
    with pytest.raises(ValueError, match="window, num_memory"):
        create_mixer("routing_kmeans", 8, 2, window=0)
