"""Sparse prefill against its rules written out, its limits, and that its choice, not its mask, looks ahead."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import check, create_mixer, record
from attnlab.core.errors import UnsupportedError
from attnlab.mixers.sparse.frontier_rules import block_sparsity, blocks_for
from mixers.definition import assert_defined_by, build, split_heads, tokens
from mixers.pattern_definition import over_keys

SMALL = {"num_lines": 4, "num_last": 3, "num_sinks": 1, "num_near": 2, "min_lines": 3, "mass": 0.6}


def best(scores: dict[int, float], forced: list[int], count: int) -> list[int]:
    return sorted(scores, key=lambda r: (r not in forced, -scores[r]))[:count]


def blocks(q: Tensor, k: Tensor, b: int, count: int, hide_later: bool):
    """The keys of query i by means of blocks; q, k (n, d)."""
    n = len(q)
    parts = [list(range(s, min(n, s + b))) for s in range(0, n, b)]

    def keys(i: int) -> list[int]:
        own = i // b
        mine = q[parts[own]].mean(0)
        scores = {r: float(mine @ k[parts[r]].mean(0)) for r in range(len(parts)) if r <= own or not hide_later}
        forced = [0, own, own - 1] + ([] if hide_later else [own + 1])
        return sorted(j for r in best(scores, forced, count) for j in parts[r] if j <= i or not hide_later)

    return keys


def lines(q: Tensor, k: Tensor, flexible: bool, hide_later: bool):
    """The keys of query i by columns and diagonals."""
    n, d = q.shape
    columns = dict.fromkeys(range(n), 0.0)
    diagonals = dict.fromkeys(range(0 if hide_later else 1 - n, n), 0.0)
    last = range(max(0, n - SMALL["num_last"]), n)
    for i in last:
        seen = range(i + 1 if hide_later else n)
        weights = torch.stack([q[i] @ k[j] / math.sqrt(d) for j in seen]).softmax(0)
        for j in seen:
            columns[j] += float(weights[j]) / len(last)
            diagonals[i - j] += float(weights[j]) / len(last)

    def chosen(scores: dict[int, float], forced: list[int]) -> list[int]:
        count = SMALL["num_lines"]
        if flexible:
            total, needed = 0.0, 1
            for share in sorted(scores.values(), reverse=True):
                total += share
                needed += total <= SMALL["mass"]
            count = min(count, max(SMALL["min_lines"], needed))
        return [r for r in best(scores, forced, count) if scores[r] > 0 or r in forced]

    of_columns = chosen(columns, list(range(SMALL["num_sinks"])))
    of_diagonals = chosen(diagonals, [o for o in diagonals if abs(o) < SMALL["num_near"]])
    return lambda i: [j for j in range(i + 1 if hide_later else n) if j in of_columns or i - j in of_diagonals]


@pytest.mark.tier("T2", "mixer:sparse_prefill")
@pytest.mark.parametrize("hide_later", [False, True])
@pytest.mark.parametrize("rule", ["block", "vertical_slash", "flex_prefill"])
def test_equals_its_definition(rule, hide_later) -> None:
    mixer = build("sparse_prefill", rule=rule, block=2, num_blocks=4, hide_later=hide_later, **SMALL)
    x = tokens(13, 12, 1)
    q, k = (split_heads(p(x)[0].detach(), 3) for p in (mixer.q_proj, mixer.k_proj))
    if rule == "block":
        heads = [blocks(q[h], k[h], 2, 4, hide_later) for h in range(3)]
    else:
        heads = [lines(q[h], k[h], rule == "flex_prefill", hide_later) for h in range(3)]
    assert_defined_by(mixer, over_keys(mixer, lambda h, i, n: heads[h](i)), x)


@pytest.mark.parametrize("rule", ["block", "vertical_slash", "flex_prefill"])
def test_all_blocks_or_lines_are_dense_attention(rule) -> None:
    options = {"block": 3, "num_blocks": 9, "num_lines": 30, "mass": 1.0, "min_lines": 30}
    x = tokens(13)
    for hide_later in (False, True):
        mixer = build("sparse_prefill", rule=rule, hide_later=hide_later, **options)
        dense = build("softmax", causal=hide_later)
        dense.load_state_dict(mixer.state_dict())
        torch.testing.assert_close(mixer(x), dense(x))


def test_the_triangular_choice_looks_ahead_and_the_mask_does_not() -> None:
    mixer = build("sparse_prefill", rule="vertical_slash", hide_later=True, **SMALL)
    x = tokens(17)
    assert float(mixer.mixing_matrix(x).detach().triu(1).abs().max()) == 0.0
    (gradient,) = torch.autograd.grad(mixer(x)[:, 5].sum(), x)
    assert float(gradient[:, 6:].abs().max()) == 0.0
    other = x.detach().clone()
    other[:, -3:] = 5 * torch.randn_like(other[:, -3:])
    assert not torch.allclose(mixer(other)[:, :14], mixer(x)[:, :14])


@settings(max_examples=15)
@given(st.data())
def test_a_key_counts_once(data) -> None:
    n = data.draw(st.integers(1, 40))
    rule = data.draw(st.sampled_from(["block", "vertical_slash", "flex_prefill"]))
    options = {"block": data.draw(st.integers(1, 6)), "hide_later": data.draw(st.booleans())}
    mixer = build("sparse_prefill", 8, 4, rule=rule, num_blocks=3, num_kv_heads=2, **options, **SMALL)
    x, mask = torch.randn(2, n, 8, dtype=torch.float64), torch.rand(2, n) > 0.3
    with record(mixer, only=["selection"]) as tape:
        weights = mixer.mixing_matrix(x, mask=mask)
        q, k, _ = mixer.project(x)
    assert "selection" in tape
    seen = weights > 0
    logits = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(2)).masked_fill(~seen, -1e30)
    expected = logits.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    torch.testing.assert_close(weights, expected)


def test_every_rule_keeps_the_laws() -> None:
    options = {"rule": "flex_prefill", **SMALL}
    check("sparse_prefill", options=options, only=["padding_right*", "padding_inside"]).raise_if_failed()


def test_sparsity_of_blocks() -> None:
    assert block_sparsity(8, 8) == 0.0
    assert block_sparsity(8, 4) == pytest.approx(1 - 26 / 36)
    assert blocks_for(64, 0.5) == 19
    assert blocks_for(4, 0.9) == 3


def test_refusals() -> None:
    with pytest.raises(ValueError, match="rule: expected one of"):
        create_mixer("sparse_prefill", 8, 2, rule="star")
    with pytest.raises(ValueError, match="mass: expected 0 to 1"):
        create_mixer("sparse_prefill", 8, 2, mass=2)
    with pytest.raises(ValueError, match="num_lines: expected at least 1"):
        create_mixer("sparse_prefill", 8, 2, num_lines=0)
    with pytest.raises(UnsupportedError, match="causal=True"):
        create_mixer("sparse_prefill", 8, 2, causal=True)
