"""Normalised linear attention by its recurrence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnlab
from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens

ETAS = {"exp": torch.exp, "softplus": lambda t: torch.log(1 + torch.exp(t)), "sigmoid": lambda t: 1 / (1 + torch.exp(-t))}


@pytest.mark.tier("T2", "mixer:normalized_linear")
@pytest.mark.parametrize("eta", list(ETAS))
def test_causal_recurrence(eta) -> None:
    mixer = build("normalized_linear", 8, 2, causal=True, eta=eta, feature_map="softplus")

    def definition(x: Tensor) -> Tensor:
        parts = (split_heads(layer(x), 2) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        q, k, v = ([F.softplus(t) if kind < 2 else t for t in part] for kind, part in enumerate(parts))
        etas, heads = ETAS[eta](mixer.eta_proj(x)), []
        for h in range(2):
            state, rows = torch.zeros(x.shape[0], 4, 4, dtype=x.dtype), []
            for i in range(x.shape[1]):
                now, last = etas[:, i, h, None, None], etas[:, max(i - 1, 0), h, None, None]
                state = last / now * state + k[h][:, i, :, None] * v[h][:, i, None] / now
                rows.append((q[h][:, i, None] @ state)[:, 0])
            heads.append(torch.stack(rows, 1))
        return mixer.out_proj(torch.cat(heads, -1))

    assert_defined_by(mixer, definition, tokens(6, 8))


@pytest.mark.tier("T2", "mixer:normalized_linear")
def test_over_all_tokens() -> None:
    mixer = build("normalized_linear", 8, 2)

    def definition(x: Tensor) -> Tensor:
        q, k, v = (split_heads(layer(x), 2) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        etas = torch.exp(mixer.eta_proj(x))
        heads = [(F.elu(q[h]) + 1) @ (F.elu(k[h]) + 1).mT @ v[h] / etas[..., h, None] for h in range(2)]
        return mixer.out_proj(torch.cat(heads, -1))

    assert_defined_by(mixer, definition, tokens(6, 8))


def test_the_contract_with_a_position() -> None:
    options = {"position": "rotary", "eta": "softplus"}
    report = attnlab.check("normalized_linear", options=options, only=["streaming*", "caus*", "combined*", "dynamics*"])
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": "relu"}, "eta: expected one of"),
        ({"feature_map": "positive"}, "feature_map: expected one of"),
        ({"num_kv_heads": 1}, "num_kv_heads: expected 2"),
        ({"position": "alibi"}, "position: expected one in queries and keys"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("normalized_linear", 8, 2, **options)
