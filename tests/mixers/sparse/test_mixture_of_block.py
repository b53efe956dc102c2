"""Mixture of block attention against its rules written out query by query, and its limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer, record
from attnlab.core.errors import UnsupportedError
from attnlab.mixers.sparse.mixture_of_block import block_of_layer
from mixers.definition import assert_defined_by, build, split_heads, tokens


def names_of_blocks(grid, block):
    """The block of each cell, by name."""
    sides = (block, *grid[1:]) if isinstance(block, int) else (*grid[: len(grid) - len(block)], *block)
    return [tuple(c // s for c, s in zip(cell, sides, strict=True)) for cell in itertools.product(*map(range, grid))]


def chosen_pairs(scores, own, mixer):
    """Pairs (head, query, block) of one example beside own ones; ``scores``: those that may be used, as numbers."""
    rows: dict = {}
    for h, i, c in scores:
        row = {"query": (h, i), "head": h, "example": 0, "block": c}[mixer.scope]
        rows.setdefault(row, []).append((h, i, c))
    found = set()
    for row in rows.values():
        if mixer.top_k is not None:
            number = mixer.top_k * len({(h, i) for h, i, _ in row})
            best = sorted(row, key=lambda pair: (pair[2] != own[pair[1]], -scores[pair]))
            found |= set(best[:number])
            continue
        low, high = min(scores[pair] for pair in row), max(scores[pair] for pair in row)
        scaled = {pair: (scores[pair] - low) / (high - low if high - low > 1e-6 else 1.0) for pair in row}
        total = sum(scaled.values()) + 1e-6
        needed = max(0.0, mixer.threshold - sum(scaled[pair] for pair in row if pair[2] == own[pair[1]]) / total)
        gained, taken = 0.0, 0
        for pair in sorted((pair for pair in row if pair[2] != own[pair[1]]), key=lambda pair: -scaled[pair]):
            if taken and gained / total >= needed:
                break
            found.add(pair)
            gained, taken = gained + scaled[pair], taken + 1
    return found


def definition(mixer, grid, mask=None):
    own = names_of_blocks(grid, mixer.block)

    def attend(x: Tensor) -> Tensor:
        n, heads = x.shape[1], mixer.num_heads
        per_key = heads // mixer.num_kv_heads
        q = split_heads(mixer.q_proj(x), heads)
        k, v = (split_heads(p(x), mixer.num_kv_heads) for p in (mixer.k_proj, mixer.v_proj))
        out = []
        for b in range(len(x)):
            real = [i for i in range(n) if mask is None or mask[b, i]]
            scores = {}
            for h, i in itertools.product(range(heads), real):
                for c in sorted({own[j] for j in real}):
                    keys = [j for j in real if own[j] == c and (not mixer.causal or c != own[i] or j <= i)]
                    if mixer.causal and c > own[i]:
                        continue
                    scores[h, i, c] = float(q[h][b, i].detach() @ k[h // per_key][b, keys].detach().mean(0))
            found = chosen_pairs(scores, own, mixer)
            rows = []
            for i in range(n):
                parts = []
                for h in range(heads):
                    keys = [j for j in real if own[j] == own[i] or (h, i, own[j]) in found]
                    keys = [j for j in keys if not mixer.causal or j <= i] if i in real else []
                    if not keys:
                        parts.append(torch.zeros_like(q[h][b, i]))
                        continue
                    logits = k[h // per_key][b, keys] @ q[h][b, i] / math.sqrt(q[h].shape[-1])
                    parts.append(logits.softmax(0) @ v[h // per_key][b, keys])
                rows.append(torch.cat(parts))
            out.append(torch.stack(rows))
        y = mixer.out_proj(torch.stack(out))
        return y if mask is None else y * mask.unsqueeze(-1)

    return attend


CASES = [
    ((13,), 3, {"top_k": 2}),
    ((13,), 4, {"top_k": 2, "causal": True}),
    ((13,), 3, {"threshold": 0.6, "causal": True, "num_kv_heads": 1}),
    ((11,), 2, {"threshold": 0.4, "scope": "query"}),
    ((5, 3), 2, {"threshold": 0.5}),
    ((5, 3), (2, 2), {"top_k": 2, "scope": "head"}),
    ((3, 2, 2), 1, {"threshold": 0.3, "scope": "block"}),
    ((2, 3, 3), (2, 2), {"threshold": 0.5, "scope": "example"}),
    ((2, 3, 3), (1, 2, 2), {"top_k": 2, "scope": "example"}),
]


@pytest.mark.tier("T2", "mixer:mixture_of_block")
@pytest.mark.parametrize(("grid", "block", "options"), CASES, ids=str)
def test_equals_its_definition(grid, block, options) -> None:
    mixer = build("mixture_of_block", 8, 2, block=block, **options)
    assert_defined_by(mixer, definition(mixer, grid), tokens(math.prod(grid), 8), grid=grid)


@pytest.mark.tier("T2", "mixer:mixture_of_block")
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_sizes_and_masks(data) -> None:
    rank = data.draw(st.integers(1, 3))
    grid = data.draw(st.tuples(*[st.integers(1, {1: 11, 2: 4, 3: 3}[rank])] * rank))
    block = data.draw(st.integers(1, 5) | st.tuples(*[st.integers(1, 3)] * data.draw(st.integers(1, rank))))
    causal = isinstance(block, int) and data.draw(st.booleans())
    options = (
        {"top_k": data.draw(st.integers(1, 4))} if data.draw(st.booleans()) else {"threshold": data.draw(st.floats(0.0, 1.5))}
    )
    scopes = ["query"] if causal else ["query", "head", "example"] + (["block"] if "threshold" in options else [])
    mixer = build("mixture_of_block", 4, 2, block=block, causal=causal, scope=data.draw(st.sampled_from(scopes)), **options)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mask = torch.rand(2, math.prod(grid), generator=generator) < 0.7
    x = torch.randn(2, math.prod(grid), 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, mask=mask, grid=grid), definition(mixer, grid, mask)(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"top_k": 9}, {"threshold": 1.0}])
def test_all_blocks_are_dense_attention(causal, options) -> None:
    blocks, dense = build("mixture_of_block", block=3, causal=causal, **options), build("softmax", causal=causal)
    dense.load_state_dict(blocks.state_dict())
    x = tokens(17)
    torch.testing.assert_close(blocks(x), dense(x))


def test_a_larger_threshold_attends_to_more() -> None:
    kept = []
    for threshold in (0.0, 0.25, 0.5, 1.0):
        mixer = build("mixture_of_block", block=2, threshold=threshold)
        with record(mixer, only=["selection"]) as tape, torch.no_grad():
            torch.manual_seed(0)
            mixer(tokens(24))
        kept.append(int(tape["selection"].sum()))
    assert kept == sorted(kept)
    assert kept[0] == 2 * 3 * (24 + 1)  # own blocks, and one pair more a head and example
    assert kept[-1] == 2 * 3 * 24 * 12


def test_layers_take_turns() -> None:
    blocks = (1, (2, 2), (1, 2, 2))
    assert [block_of_layer(blocks, layer) for layer in range(4)] == [1, (2, 2), (1, 2, 2), 1]
    with pytest.raises(ValueError, match="blocks, layer"):
        block_of_layer((), 0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="block: expected 1 to 3 sides"):
        create_mixer("mixture_of_block", 8, 2, block=(2, 0))
    with pytest.raises(ValueError, match="top_k: expected at least 1"):
        create_mixer("mixture_of_block", 8, 2, top_k=0)
    with pytest.raises(ValueError, match="scope: expected one of"):
        create_mixer("mixture_of_block", 8, 2, top_k=2, scope="block")
    with pytest.raises(ValueError, match="position: expected 'none' or 'rotary'"):
        create_mixer("mixture_of_block", 8, 2, position="alibi")
    with pytest.raises(UnsupportedError, match="later ones"):
        create_mixer("mixture_of_block", 8, 2, causal=True, scope="head")
    with pytest.raises(UnsupportedError, match="follow one another"):
        create_mixer("mixture_of_block", 8, 2, causal=True, block=(2, 2))
    with pytest.raises(UnsupportedError, match="rank 1"):
        create_mixer("mixture_of_block", 8, 2, block=(2, 2))(torch.randn(1, 9, 8))
