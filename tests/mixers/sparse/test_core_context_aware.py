"""Core context aware attention against its definition written out query by query, its limits and its stream."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer
from attnlab.core.errors import UnsupportedError
from mixers.definition import assert_defined_by, build, split_heads, tokens


def turn(x: Tensor, place: int) -> Tensor:
    """Rotary position of one place, (b, d)."""
    half = x.shape[-1] // 2
    out = list(x.unbind(-1))
    for pair in range(half):
        angle = place * 10000.0 ** (-2 * pair / x.shape[-1])
        a, b = x[..., pair], x[..., pair + half]
        out[pair], out[pair + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return torch.stack(out, -1)


def definition(mixer, g: int, s: int, overlap: bool = False, rotary: str = "none"):
    """The card's equations; ``rotary`` is "none", "after" (core at its group's last place) or "before" (keys turned first)."""

    def attend(x: Tensor) -> Tensor:
        n, width = x.shape[1], mixer.head_dim
        place = (lambda t, i: turn(t, i)) if rotary != "none" else (lambda t, i: t)
        heads = []
        for q, k, v in zip(
            *(split_heads(p(x), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)), strict=True
        ):
            rows = []
            for i in range(n):
                query = place(q[:, i], i)
                groups = max(0, (i + 1 - s) // g)
                keys, values = [], []
                for a in range(groups):
                    inside = range(a * g, a * g + g)
                    last = a * g + g - 1
                    logits = torch.stack([(place(q[:, last], last) * place(k[:, j], j)).sum(-1) for j in inside], -1)
                    w = (logits / math.sqrt(width)).softmax(-1)
                    if rotary == "before":
                        keys.append(sum(w[:, c, None] * place(k[:, j], j) for c, j in enumerate(inside)))
                    else:
                        keys.append(place(sum(w[:, c, None] * k[:, j] for c, j in enumerate(inside)), last))
                    values.append(sum(w[:, c, None] * v[:, j] for c, j in enumerate(inside)))
                for j in range(max(0, groups * g - overlap), i + 1):
                    keys.append(place(k[:, j], j))
                    values.append(v[:, j])
                logits = torch.stack([(query * key).sum(-1) for key in keys], -1) / math.sqrt(width)
                rows.append((logits.softmax(-1).unsqueeze(-1) * torch.stack(values, 1)).sum(1))
            heads.append(torch.stack(rows, 1))
        return mixer.out_proj(torch.cat(heads, -1))

    return attend


CASES = [(2, 3, 13, False), (3, 1, 11, False), (4, 6, 23, True), (5, 2, 4, False), (2, 1, 9, True)]


@pytest.mark.tier("T2", "mixer:core_context_aware")
@pytest.mark.parametrize(("g", "s", "n", "overlap"), CASES)
def test_equals_its_definition(g, s, n, overlap) -> None:
    mixer = build("core_context_aware", group=g, window=s, overlap=overlap)
    assert_defined_by(mixer, definition(mixer, g, s, overlap), tokens(n))


@pytest.mark.tier("T2", "mixer:core_context_aware")
@pytest.mark.parametrize("before", [False, True])
def test_where_a_core_stands(before) -> None:
    mixer = build("core_context_aware", group=3, window=2, position="rotary", pool_rotated=before)
    mixer.position.frequencies = mixer.position.frequencies.new_tensor([10000.0 ** (-p / 2) for p in range(2)]).double()
    assert_defined_by(mixer, definition(mixer, 3, 2, rotary="before" if before else "after"), tokens(12))


@pytest.mark.parametrize(("g", "s"), [(1, 2), (3, 40), (16, 13)])
def test_groups_of_one_token_or_few_tokens_are_dense_attention(g, s) -> None:
    mixer, dense = build("core_context_aware", group=g, window=s), build("softmax", causal=True)
    dense.load_state_dict(mixer.state_dict())
    x = tokens(13)
    torch.testing.assert_close(mixer(x), dense(x))


@settings(max_examples=15)
@given(st.data())
def test_any_split_and_mask(data) -> None:
    g, s, n = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    options = {"overlap": data.draw(st.booleans()), "position": data.draw(st.sampled_from(["none", "rotary"]))}
    mixer = build("core_context_aware", 8, 4, group=g, window=s, num_kv_heads=2, **options)
    x = torch.randn(2, n, 8, dtype=torch.float64)
    mask = torch.rand(2, n) > 0.4 if data.draw(st.booleans()) else None
    state, outputs, start = mixer.init_state(2), [], 0
    while start < n:
        size = data.draw(st.integers(1, n - start))
        part = slice(start, start + size)
        y, state = mixer.extend(x[:, part], state, mask=None if mask is None else mask[:, part])
        outputs.append(y)
        start += size
        assert state["k"].shape[2] <= s + g
        assert state["core_k"].shape[2] == start // g
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x, mask=mask))


def test_a_core_is_seen_only_once_its_group_is_over() -> None:
    mixer = build("core_context_aware", group=3, window=2)
    x = tokens(11)
    weights = mixer.mixing_matrix(x).detach()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert float(weights.triu(1).abs().max()) == 0.0
    assert float(weights[..., 10, :].min()) > 0.0  # the whole past, pooled or not


def test_long_sequences_fill_many_tiles() -> None:
    mixer = build("core_context_aware", 4, 1, group=2, window=5)
    x = tokens(331, 4, 1)
    state, parts = mixer.init_state(1), []
    for piece in x.split(97, dim=1):
        y, state = mixer.extend(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="group: expected at least 1"):
        create_mixer("core_context_aware", 8, 2, group=0)
    with pytest.raises(ValueError, match="window: expected at least 1"):
        create_mixer("core_context_aware", 8, 2, window=0)
    with pytest.raises(ValueError, match="position: expected 'none' or 'rotary'"):
        create_mixer("core_context_aware", 8, 2, position="alibi")
    with pytest.raises(UnsupportedError, match="causal=False"):
        create_mixer("core_context_aware", 8, 2, causal=False)
