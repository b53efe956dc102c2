"""Long-query attention and its mixture with short queries, by their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from attnlab.mixers.dense.short_long_query import mix_branches
from mixers.definition import assert_defined_by, build, split_heads, tokens

MASK = torch.tensor([[False, True, True, False, True, True, True], [True] * 5 + [False] * 2])
H, DIM = 3, 12


def _normed(norm, u: Tensor) -> Tensor:
    centred = u - u.mean()
    return norm.weight * centred / torch.sqrt(centred.square().mean() + norm.eps) + norm.bias


def _definition(mixer, x: Tensor, mask: Tensor) -> Tensor:
    x = x * mask[..., None]
    out = []
    for b in range(len(x)):
        sources = []
        for t in range(x.shape[1]):
            seen = [s for s in range(max(0, t - mixer.window + 1), t + 1) if mask[b, s]]
            total = sum((x[b, s] for s in seen), torch.zeros_like(x[b, t]))
            sources.append(_normed(mixer.query_norm, total / (len(seen) + 1e-24)))
        source = torch.stack(sources)
        q, k, v = split_heads(mixer.q_proj(source), H), split_heads(mixer.k_proj(x[b]), H), split_heads(mixer.v_proj(x[b]), H)
        rows = []
        for t in range(x.shape[1]):
            keys = [s for s in range(x.shape[1]) if mask[b, s] and (s <= t or not mixer.causal)]
            if not mask[b, t]:
                rows.append(torch.zeros_like(x[b, t]))
                continue
            heads = []
            for h in range(H):
                weights = torch.softmax(torch.stack([q[h][t] @ k[h][s] / math.sqrt(DIM // H) for s in keys]), 0)
                heads.append(sum(w * v[h][s] for w, s in zip(weights, keys, strict=True)))
            y = mixer.out_proj(torch.cat(heads))
            rows.append(y + source[t] if mixer.residual else y)
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.tier("T2", "mixer:long_query")
@pytest.mark.parametrize("options", [{"window": 3}, {"window": 1}, {"window": 9, "residual": False, "project_out": True}])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_long_query(options, causal, masked) -> None:
    mixer = build("long_query", DIM, H, causal=causal, **options)
    mask = MASK if masked else torch.ones_like(MASK)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, mask), tokens(7), mask=mask if masked else None)


@pytest.mark.tier("T2", "mixer:short_long_query")
def test_short_and_long() -> None:
    mixer = build("short_long_query", DIM, H, causal=True, alpha=0.3)
    short, long = mixer.branches["short"], mixer.branches["long"]
    assert (short.window, long.window) == (1, 3)
    definition = lambda x: 0.3 * _definition(short, x, MASK) + 0.7 * _definition(long, x, MASK)  # noqa: E731
    assert_defined_by(mixer, definition, tokens(7), mask=MASK)


def test_a_state_keeps_the_last_inputs() -> None:
    mixer = build("long_query", DIM, H, causal=True, window=4)
    x = tokens(7).detach()
    _, state = mixer.extend(x[:, :2], mixer.init_state(2))
    assert torch.equal(state["inputs"][:, 1:], x[:, :2])
    assert state["counted"].tolist() == [[0.0, 1.0, 1.0]] * 2
    _, state = mixer.extend(x[:, 2:], state)
    assert torch.equal(state["inputs"], x[:, 4:])


def test_bad_options_are_named() -> None:
    for name, options in (("window", {"window": 0}), ("head_dim", {"head_dim": 5})):
        with pytest.raises(ValueError, match=name):
            create_mixer("long_query", DIM, H, **options)
    with pytest.raises(ValueError, match="alpha"):
        create_mixer("short_long_query", DIM, H, alpha=1.5)
    with pytest.raises(ValueError, match="alpha"):
        mix_branches(torch.ones(2), torch.ones(2), -0.1)
