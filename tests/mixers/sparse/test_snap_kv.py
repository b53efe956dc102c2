"""SnapKV against its definition written out, its limits and its stream."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import check, create_mixer, record
from attnlab.core.errors import UnsupportedError
from mixers.definition import assert_defined_by, build, split_heads, tokens
from mixers.pattern_definition import over_keys

SMALL = {"prompt": 9, "capacity": 4, "num_last": 3, "kernel": 3, "num_near": 1, "num_sinks": 1, "min_ratio": 0.6}


def importance(q: list[Tensor], k: list[Tensor], h: int, ada: bool) -> list[float]:
    """u of one head without groups, pooled."""
    end, found = SMALL["prompt"], [0.0] * SMALL["prompt"]
    for t in range(end - SMALL["num_last"], end):
        weights = torch.stack([q[h][t] @ k[h][j] / math.sqrt(q[h].shape[-1]) for j in range(t + 1)]).softmax(0).tolist()
        for j, w in enumerate(weights):
            found[j] = max(found[j], w) if ada else found[j] + w
    reach, padded = SMALL["kernel"] // 2, [0.0] * 9 + found + [0.0] * 9
    return [sum(padded[9 + j - reach : 10 + j + reach]) / SMALL["kernel"] for j in range(end)]


def kept(q: list[Tensor], k: list[Tensor], ada: bool) -> list[set[int]]:
    """What each head keeps of the prompt."""
    end, c = SMALL["prompt"], SMALL["capacity"]
    scores = [importance(q, k, h, ada) for h in range(len(q))]
    for own in scores:
        own[0] = own[end - 1] = math.inf
    ranked = [sorted(range(end), key=lambda j: -own[j]) for own in scores]
    if not ada:
        return [set(places[:c]) for places in ranked]
    least = max(int(SMALL["min_ratio"] * c), 2)
    mine = [set(places[:least]) for places in ranked]
    rest = sorted(((h, j) for h in range(len(q)) for j in ranked[h][least:]), key=lambda hj: -scores[hj[0]][hj[1]])
    for h, j in rest[: len(q) * (c - least)]:
        mine[h].add(j)
    return mine


@pytest.mark.tier("T2", "mixer:snap_kv")
@pytest.mark.parametrize("rule", ["snap", "ada_snap"])
def test_equals_its_definition(rule) -> None:
    mixer = build("snap_kv", rule=rule, **SMALL)
    x = tokens(14, 12, 1)
    q, k = (split_heads(p(x)[0].detach(), 3) for p in (mixer.q_proj, mixer.k_proj))
    places = kept(q, k, rule == "ada_snap")
    end = SMALL["prompt"]

    def keys(h: int, i: int, n: int) -> list[int]:
        return [j for j in range(i + 1) if i < end or j >= end or j in places[h]]

    assert_defined_by(mixer, over_keys(mixer, keys), x)


def test_shared_budgets_differ_by_head() -> None:
    mixer = build("snap_kv", rule="ada_snap", **SMALL)
    with record(mixer, only=["selection"]) as tape:
        mixer(tokens(12))
    counts = (tape["selection"] >= 0).sum(-1)
    assert torch.equal(counts.sum(-1), torch.tensor([12, 12]))
    assert len(set(counts.flatten().tolist())) > 1


@pytest.mark.parametrize("rule", ["snap", "ada_snap"])
@pytest.mark.parametrize("sizes", [{"prompt": 20, "capacity": 2}, {"prompt": 6, "capacity": 6}])
def test_a_cache_for_all_keys_is_dense_attention(rule, sizes) -> None:
    mixer, dense = build("snap_kv", rule=rule, num_last=3, **sizes), build("softmax", causal=True)
    dense.load_state_dict(mixer.state_dict())
    x = tokens(13)
    torch.testing.assert_close(mixer(x), dense(x))


@settings(max_examples=20)
@given(st.data())
def test_any_split_and_mask(data) -> None:
    n, rule = data.draw(st.integers(1, 30)), data.draw(st.sampled_from(["snap", "ada_snap"]))
    options = {"prompt": data.draw(st.integers(1, 20)), "capacity": data.draw(st.integers(1, 9))}
    options |= {"num_last": data.draw(st.integers(1, 9)), "num_near": 2, "kernel": 3, "num_sinks": 1}
    mixer = build("snap_kv", 8, 4, rule=rule, num_kv_heads=2, position="rotary", **options)
    x = torch.randn(2, n, 8, dtype=torch.float64)
    mask = torch.rand(2, n) > 0.4 if data.draw(st.booleans()) else None
    state, outputs, start = mixer.init_state(2), [], 0
    while start < n:
        part = slice(start, start + data.draw(st.integers(1, n - start)))
        y, state = mixer.extend(x[:, part], state, mask=None if mask is None else mask[:, part])
        outputs.append(y)
        start = part.stop
        if start >= mixer.prompt:
            assert state["k"].shape[2] == start - mixer.prompt
            assert int(state["kept_real"].sum(-1).sum(-1).max()) <= 2 * mixer.capacity
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x, mask=mask))


def test_every_rule_keeps_the_laws() -> None:
    options = {**SMALL, "rule": "ada_snap", "prompt": 5}
    check("snap_kv", options=options, only=["padding_*", "causality_*", "streaming_padding"]).raise_if_failed()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="rule: expected one of"):
        create_mixer("snap_kv", 8, 2, rule="star")
    with pytest.raises(ValueError, match="kernel: expected an odd number"):
        create_mixer("snap_kv", 8, 2, kernel=4)
    with pytest.raises(ValueError, match="prompt: expected at least 1"):
        create_mixer("snap_kv", 8, 2, prompt=0)
    with pytest.raises(ValueError, match="min_ratio: expected 0 to 1"):
        create_mixer("snap_kv", 8, 2, min_ratio=2)
    with pytest.raises(UnsupportedError, match="causal=False"):
        create_mixer("snap_kv", 8, 2, causal=False)
