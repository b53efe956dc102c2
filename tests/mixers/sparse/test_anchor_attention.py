"""Anchor attention against its three steps written out token by token, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer, record
from mixers.definition import assert_defined_by, build, split_heads, tokens


def definition(mixer, init_blocks, local_groups, mask=None):
    block, size = mixer.block, mixer.block * mixer.step
    first = init_blocks * block

    def near(i: int, j: int) -> bool:
        distance = i // size - j // size
        return (distance >= 0 or not mixer.ordered) and abs(distance) < local_groups

    def attend(x: Tensor) -> Tensor:
        n, heads = x.shape[1], mixer.num_heads
        q = split_heads(mixer.q_proj(x), heads)
        k, v = (split_heads(p(x), mixer.num_kv_heads) for p in (mixer.k_proj, mixer.v_proj))
        out = []
        for b in range(len(x)):
            real = [i for i in range(n) if mask is None or mask[b, i]]
            columns = []
            for h in range(heads):
                kv = h // (heads // mixer.num_kv_heads)
                score = (q[h][b] @ k[kv][b].mT / math.sqrt(q[h].shape[-1])).detach()
                usable = {i: [j for j in real if j <= i or not mixer.ordered] for i in real}
                base = {i: [j for j in usable[i] if j < first or near(i, j)] for i in real}
                largest = {i: max(float(score[i, j]) for j in base[i]) for i in real}
                rows = []
                for i in range(n):
                    if i not in real:
                        rows.append(torch.zeros_like(v[kv][b, i]))
                        continue
                    group = i // size - (1 if mixer.causal else 0)
                    keys = list(base[i])
                    for j in usable[i]:
                        if j >= first and not near(i, j):
                            for u in range(group * mixer.step, (group + 1) * mixer.step):
                                members = [m for m in real if m // block == u]
                                if members:
                                    pooled = sum(float(score[m, j]) for m in members) / len(members)
                                    anchor = sum(largest[m] for m in members) / len(members)
                                    if anchor - pooled <= mixer.theta:
                                        keys.append(j)
                                        break
                    logits = k[kv][b, keys] @ q[h][b, i] / math.sqrt(q[h].shape[-1])
                    rows.append(logits.softmax(0) @ v[kv][b, keys])
                columns.append(torch.stack(rows))
            out.append(torch.cat(columns, dim=-1))
        y = mixer.out_proj(torch.stack(out))
        return y if mask is None else y * mask.unsqueeze(-1)

    return attend


@pytest.mark.tier("T2", "mixer:anchor_attention")
@pytest.mark.parametrize("order", [{}, {"causal": True}, {"hide_later": True}], ids=str)
@pytest.mark.parametrize(
    ("block", "step", "init", "local", "theta", "options"),
    [(2, 2, 1, 1, 0.5, {}), (3, 1, 0, 1, 0.2, {"num_kv_heads": 1}), (1, 3, 2, 2, 0.3, {}), (2, 2, 3, 1, 1.0, {})],
)
def test_equals_its_definition(block, step, init, local, theta, options, order) -> None:
    sizes = {"block": block, "step": step, "init_blocks": init, "local_groups": local, "theta": theta}
    mixer = build("anchor_attention", 12, 3, **order, **sizes, **options)
    with record(mixer, only=["selection"]) as tape:
        assert_defined_by(mixer, definition(mixer, init, local), tokens(19, 12))
    assert bool(tape["selection"].any()) and not bool(tape["selection"].all())


@pytest.mark.tier("T2", "mixer:anchor_attention")
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_sizes_and_masks(data) -> None:
    n, init, local = data.draw(st.integers(1, 17)), data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    sizes = {"block": data.draw(st.integers(1, 4)), "step": data.draw(st.integers(1, 3)), "theta": data.draw(st.floats(-1, 2))}
    order = data.draw(st.sampled_from([{}, {"causal": True}, {"hide_later": True}]))
    mixer = build("anchor_attention", 4, 2, init_blocks=init, local_groups=local, **order, **sizes)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mask = torch.rand(2, n, generator=generator) < 0.7
    x = torch.randn(2, n, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, mask=mask), definition(mixer, init, local, mask)(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [{}, {"causal": True}, {"hide_later": True}], ids=str)
@pytest.mark.parametrize("theta", [1e6, math.inf])
def test_a_large_theta_is_dense_attention(order, theta) -> None:
    mixer = build("anchor_attention", block=2, step=2, theta=theta, **order)
    dense = build("softmax", causal=bool(order))
    dense.load_state_dict(mixer.state_dict())
    x = tokens(19)
    torch.testing.assert_close(mixer(x), dense(x))


def test_a_small_theta_keeps_first_and_near_keys() -> None:
    mixer = build("anchor_attention", block=2, step=2, theta=-math.inf, hide_later=True)
    kept = mixer.mixing_matrix(tokens(11)) > 0
    i, j = torch.arange(11)[:, None], torch.arange(11)
    assert torch.equal(kept, ((j <= i) & ((j < 2) | (j >= i // 4 * 4))).expand_as(kept))


def test_the_published_choice_looks_ahead_and_the_causal_one_does_not() -> None:
    torch.manual_seed(0)
    orders = ({"hide_later": True}, {"causal": True})
    looks, causal = (build("anchor_attention", block=2, step=4, theta=0.0, **order) for order in orders)
    x = tokens(24).detach()
    other = x.clone()
    other[:, 20:] = 3 * torch.randn(2, 4, 12, dtype=torch.float64)
    torch.testing.assert_close(causal(x)[:, :20], causal(other)[:, :20])
    changed = (looks(x) - looks(other)).detach().abs().amax(-1)[:, :20]
    assert float(changed.max()) > 1e-3
    assert float(changed[:, :16].max()) == 0.0  # groups before are not touched


def test_stripes_are_found() -> None:
    """Columns that all queries score as high as the first key are kept by all groups behind them, and no others."""
    n, stripes = 128, [17, 40, 41, 70]
    generator = torch.Generator().manual_seed(0)
    mixer = create_mixer("anchor_attention", 16, 1, block=4, step=4, theta=1.0, hide_later=True)
    q, k = (0.3 * torch.randn(1, 1, n, 16, generator=generator) for _ in range(2))
    q[..., 0], k[0, 0, [0, *stripes], 0] = 6.0, 6.0
    kept = mixer.choose(q, k, None)[0, 0]
    wanted = torch.zeros(n, dtype=torch.bool)
    wanted[[0, 1, 2, 3, *stripes]] = True
    assert torch.equal(kept, wanted & (torch.arange(n) < torch.arange(0, n, 16)[:, None]))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="step: expected at least 1"):
        create_mixer("anchor_attention", 8, 2, step=0)
    with pytest.raises(ValueError, match="init_blocks: expected at least 0"):
        create_mixer("anchor_attention", 8, 2, init_blocks=-1)
    with pytest.raises(ValueError, match="hide_later: expected False with causal=True"):
        create_mixer("anchor_attention", 8, 2, causal=True, hide_later=True)
    with pytest.raises(ValueError, match="theta: expected a number"):
        create_mixer("anchor_attention", 8, 2, theta=math.nan)
    with pytest.raises(ValueError, match="position: expected 'none'"):
        create_mixer("anchor_attention", 8, 2, position="alibi")
