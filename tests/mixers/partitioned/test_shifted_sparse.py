"""Shifted sparse attention token by token, its limits, and who learns of whom over layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens


def keys_of(i: int, n: int, group: int, shifted: bool, sinks: int, causal: bool, wrapped: bool) -> list[int]:
    """The tokens that token i uses."""
    shift = math.ceil(group / 2) if shifted else 0
    if wrapped:
        ring = [(rank + shift) % n for rank in range(n)]
        rank = ring.index(i)
        return ring[rank // group * group : rank + 1]
    seen = [j for j in range(n) if (j - shift) // group == (i - shift) // group or j < sinks or i < sinks]
    return [j for j in seen if j <= i] if causal else seen


def definition(mixer):
    def attend(x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = (split_heads(p(x), mixer.num_heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        heads = []
        for h in range(mixer.num_heads):
            shifted = h >= mixer.num_heads - mixer.num_shifted
            rows = []
            for i in range(n):
                keys = keys_of(i, n, mixer.group, shifted, mixer.num_sinks, mixer.causal, mixer.wrapped)
                logits = torch.einsum("bd,bmd->bm", q[h][:, i], k[h][:, keys]) / math.sqrt(q[h].shape[-1])
                rows.append(torch.einsum("bm,bmd->bd", logits.softmax(-1), v[h][:, keys]))
            heads.append(torch.stack(rows, dim=1))
        return mixer.out_proj(torch.cat(heads, dim=-1))

    return attend


OPTIONS = [
    {"group": 4},
    {"group": 5, "causal": True},
    {"group": 4, "num_sinks": 2, "num_shifted": 1},
    {"group": 3, "num_sinks": 4, "causal": True},
    {"group": 4, "wrapped": True},
    {"group": 3, "wrapped": True, "num_shifted": 3},
]


@pytest.mark.tier("T2", "mixer:shifted_sparse")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("n", [1, 3, 11, 12])
def test_equals_its_definition(options, n) -> None:
    mixer = build("shifted_sparse", **options)
    assert_defined_by(mixer, definition(mixer), tokens(n))


@given(st.data())
def test_any_sizes(data) -> None:
    causal = data.draw(st.booleans())
    wrapped = not causal and data.draw(st.booleans())
    sinks = 0 if wrapped else data.draw(st.integers(0, 4))
    options = {"group": data.draw(st.integers(1, 9)), "num_shifted": data.draw(st.integers(0, 3))}
    mixer = build("shifted_sparse", causal=causal, wrapped=wrapped, num_sinks=sinks, **options)
    x = tokens(data.draw(st.integers(1, 17)))
    torch.testing.assert_close(mixer(x), definition(mixer)(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"group": 9, "num_shifted": 0}, {"group": 2, "num_sinks": 9}], ids=str)
def test_one_group_or_nothing_but_sinks_is_dense_attention(options, causal) -> None:
    mixer, dense = build("shifted_sparse", causal=causal, **options), build("softmax", causal=causal)
    dense.load_state_dict(mixer.state_dict())
    x = tokens(9)
    torch.testing.assert_close(mixer(x), dense(x))


@pytest.mark.parametrize(
    "options", [{"wrapped": True}, {"num_sinks": 2}, {"num_sinks": 2, "causal": True}, {"causal": True}], ids=str
)
def test_a_sequence_reaches_from_its_first_real_token_to_its_last(options) -> None:
    mixer, x = build("shifted_sparse", group=4, **options), tokens(11)
    for begin, end in ((0, 7), (3, 11), (2, 9), (4, 5)):
        mask = torch.ones(2, 11, dtype=torch.bool)
        mask[1, :begin] = mask[1, end:] = False
        y = mixer(x, mask=mask)
        torch.testing.assert_close(y[1, begin:end], mixer(x[1:, begin:end])[0])
        torch.testing.assert_close(y[0], mixer(x[:1])[0])


def sees(mixer, n: int) -> Tensor:
    """Which input reaches which output, (outputs, inputs)."""
    x = tokens(n, batch=1)
    rows = [torch.autograd.grad(mixer(x)[0, i].sum(), x)[0][0].abs().sum(-1) > 0 for i in range(n)]
    return torch.stack(rows)


def test_the_published_form_looks_ahead_and_the_causal_one_does_not() -> None:
    ahead = torch.ones(12, 12, dtype=torch.bool).triu(1)
    assert sees(build("shifted_sparse", group=4, wrapped=True), 12)[0, 10:].all()
    for sinks in (0, 2):
        assert not (sees(build("shifted_sparse", group=4, num_sinks=sinks, causal=True), 12) & ahead).any()


def test_shifted_heads_carry_over_groups_and_sinks_over_everything() -> None:
    def after(layers: int, **options) -> int:
        seen = sees(build("shifted_sparse", group=4, causal=True, **options), 16).float()
        return int((torch.linalg.matrix_power(seen, layers) > 0).sum(-1)[-1])

    assert after(4, num_shifted=0) == 4
    assert [after(layers) for layers in (1, 2, 3)] == [4, 6, 8]
    assert after(2, num_sinks=2) == 8


def test_refusals() -> None:
    with pytest.raises(ValueError, match="group: expected at least 1"):
        create_mixer("shifted_sparse", 8, 2, group=0)
    with pytest.raises(ValueError, match="num_shifted: expected 0 to num_heads=2"):
        create_mixer("shifted_sparse", 8, 2, num_shifted=3)
    with pytest.raises(ValueError, match="num_sinks: expected at least 0"):
        create_mixer("shifted_sparse", 8, 2, num_sinks=-1)
    with pytest.raises(ValueError, match="wrapped: expected False with causal=True"):
        create_mixer("shifted_sparse", 8, 2, wrapped=True, causal=True)
    with pytest.raises(ValueError, match="position: expected 'none' or 'rotary'"):
        create_mixer("shifted_sparse", 8, 2, position="alibi")
