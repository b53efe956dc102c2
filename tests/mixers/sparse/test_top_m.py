"""Top-m aggregation and its local branch against their definitions, and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer, record
from attnlab.mixers.parts.neighbor_mean import sampled
from mixers.definition import assert_defined_by, build, split_heads, tokens


def cosine(token: Tensor, probe: Tensor) -> Tensor:
    token = token.clamp(min=0)
    return (token * probe).sum() / (token.square().sum().sqrt() * probe.square().sum().sqrt())


def definition(mixer, m: int):
    def attend(x: Tensor) -> Tensor:
        outputs = []
        for tokens_ in x:
            n = len(tokens_)
            s = [cosine(token, mixer.probe) for token in tokens_]
            chosen = sorted(range(n), key=lambda j: -float(s[j].detach()))[:m]
            heads = []
            parts = [split_heads(p(tokens_), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
            for q, k, v in zip(*parts, strict=True):
                rows = []
                for i in range(n):
                    weights = torch.stack([q[i] @ k[j] / math.sqrt(mixer.head_dim) for j in chosen]).softmax(0)
                    values = [v[j] * (s[j] if mixer.score_weighted else 1) for j in chosen]
                    rows.append(sum(w * value for w, value in zip(weights, values, strict=True)))
                if mixer.mode == "summary":
                    rows = [sum(rows[j] for j in chosen) / len(chosen)] * n
                heads.append(torch.stack(rows))
            outputs.append(mixer.out_proj(torch.cat(heads, -1)))
        return torch.stack(outputs)

    return attend


@pytest.mark.tier("T2", "mixer:top_m_aggregation")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["per_node", "summary"])
@pytest.mark.parametrize("m", [1, 4, 20])
def test_equals_its_definition(mode, weighted, m) -> None:
    mixer = build("top_m_aggregation", 6, 2, num_selected=m, mode=mode, score_weighted=weighted)
    assert_defined_by(mixer, definition(mixer, m), tokens(9, 6))


def test_all_tokens_are_dense_attention() -> None:
    mixer, dense = build("top_m_aggregation", num_selected=9), build("softmax")
    dense.load_state_dict({name: value for name, value in mixer.state_dict().items() if name != "probe"})
    x = tokens(9)
    torch.testing.assert_close(mixer(x), dense(x))


@settings(max_examples=15)
@given(st.data())
def test_any_size_and_mask(data) -> None:
    n, m = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 9))
    mixer = build(
        "top_m_aggregation", 8, 4, num_selected=m, mode=data.draw(st.sampled_from(["per_node", "summary"])), num_kv_heads=2
    )
    x, mask = torch.randn(2, n, 8, dtype=torch.float64), torch.rand(2, n) > 0.3
    with record(mixer, only=["selection"]) as tape:
        weights = mixer.mixing_matrix(x, mask=mask)
        mixer(x, mask=mask)
    chosen = tape["selection"]
    assert torch.equal((chosen >= 0).sum(-1), mask.sum(-1).clamp(max=m))
    torch.testing.assert_close(weights.sum(-1), mask[:, None].expand(2, 4, n).double())
    for example, places in enumerate(chosen):
        others = torch.ones(n, dtype=torch.bool)
        others[places[places >= 0]] = False
        assert bool((weights[example][..., others] == 0).all())


def test_the_probe_has_a_gradient_only_where_scores_weigh() -> None:
    x = tokens(9).detach()
    for weighted in (False, True):
        mixer = build("top_m_aggregation", num_selected=3, score_weighted=weighted)
        mixer(x).square().sum().backward()
        assert (mixer.probe.grad is not None) == weighted


def test_the_probe_turns_away_from_the_mean() -> None:
    mixer, x = build("top_m_aggregation", 4, 1), torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    mean, before = x[:, :3].mean((0, 1)), mixer.probe.detach().clone()
    mixer.turn_away(x, mask)
    expected = before - (before @ mean) * mean
    torch.testing.assert_close(mixer.probe.detach(), expected / expected.norm())


@pytest.mark.tier("T2", "mixer:sage")
def test_sage_equals_its_definition() -> None:
    mixer, edges = build("sage", 6, 2).eval(), torch.rand(2, 2, 7, 7) > 0.5
    edges[..., range(7), range(7)] = True

    def attend(x: Tensor) -> Tensor:
        rows = []
        for b in range(2):
            for i in range(7):
                parts = []
                for h in range(2):
                    neighbors = [j for j in range(7) if edges[b, h, i, j]]
                    parts.append(sum(x[b, j, 3 * h : 3 * h + 3] for j in neighbors) / len(neighbors))
                rows.append(mixer.neighbor_proj(torch.cat(parts)) + mixer.root_proj(x[b, i]))
        return torch.stack(rows).view_as(x)

    assert_defined_by(mixer, attend, tokens(7, 6), pair_mask=edges)


def test_training_samples_neighbors() -> None:
    mixer = create_mixer("sage", 4, sample_size=2, generator=torch.Generator().manual_seed(0))
    edges = torch.rand(1, 1, 9, 9) > 0.4
    with record(mixer, only=["selection"]) as tape:
        mixer.train()(torch.randn(1, 9, 4), pair_mask=edges)
        drawn = tape["selection"]
        mixer.eval()(torch.randn(1, 9, 4), pair_mask=edges)
    assert torch.equal(drawn.sum(-1), edges.sum(-1).clamp(max=2))
    assert not bool((drawn & ~edges).any())
    assert torch.equal(tape["selection"], edges)
    counts = sum(sampled(torch.ones(1, 5, 5, dtype=torch.bool), 2).long() for _ in range(400))
    assert int(counts.min()) > 100  # 160 on average
    assert int(counts.max()) < 220


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_selected: expected at least 1"):
        create_mixer("top_m_aggregation", 8, num_selected=0)
    with pytest.raises(ValueError, match="mode: expected 'per_node' or 'summary'"):
        create_mixer("top_m_aggregation", 8, mode="mean")
    with pytest.raises(ValueError, match="position: expected 'none'"):
        create_mixer("top_m_aggregation", 8, position="rotary")
    with pytest.raises(ValueError, match="sample_size: expected at least 1, or None"):
        create_mixer("sage", 8, sample_size=0)
