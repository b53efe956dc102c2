"""Clipped softmax and head gates by their definition, and the measures of outliers."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

import attnlab
from attnlab import UnsupportedError, create_mixer, record
from attnlab.ops.maps import inf_norm, kurtosis
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS = 8, 2


def _gate(mixer, x: Tensor, h: int) -> list[Tensor]:
    """The gate of one head for each token of one example."""
    gate, width = mixer.gate, DIM // HEADS
    logits = []
    for token in x:
        own = token[h * width : (h + 1) * width]
        if gate.scope == "unconditional":
            logits.append(torch.zeros((), dtype=x.dtype))
        elif gate.kind == "all_features":
            logits.append((gate.out.weight[h] * token).sum())
        elif gate.kind == "linear":
            logits.append((gate.out.weight[h, 0] * own).sum())
        else:
            hidden = [(w * own).sum() + b for w, b in zip(gate.hidden.weight[h], gate.hidden.bias[h], strict=True)]
            logits.append(sum(w * torch.relu(u) for w, u in zip(gate.out.weight[h, 0], hidden, strict=True)))
    if gate.scope == "head":
        logits = [sum(logits) / len(logits)] * len(logits)
    return [1 / (1 + torch.exp(-(logit + gate.bias[h]))) for logit in logits]


def _definition(mixer, x: Tensor, gamma: float, zeta: float, factor: float = 1.0) -> Tensor:
    width, out = DIM // HEADS, []
    for example in x:
        q, k, v = (layer(example) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        heads = []
        for h in range(HEADS):
            s = slice(h * width, (h + 1) * width)
            rows = []
            for i in range(len(example)):
                seen = range(i + 1 if mixer.causal else len(example))
                powers = [torch.exp((q[i, s] * k[j, s]).sum() / math.sqrt(width)) for j in seen]
                weights = [((zeta - gamma) * p / sum(powers) + gamma).clamp(0, 1) for p in powers]
                rows.append(sum(w * v[j, s] for w, j in zip(weights, seen, strict=True)))
            if mixer.gate is not None:
                rows = [g * factor * row for g, row in zip(_gate(mixer, example, h), rows, strict=True)]
            heads.append(torch.stack(rows))
        out.append(mixer.out_proj(torch.cat(heads, -1)))
    return torch.stack(out)


@pytest.mark.tier("T2", "mixer:quantizable")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("options", "gamma", "zeta"),
    [
        ({}, -0.03, 1.0),
        ({"gamma": -0.2, "zeta": 1.1}, -0.2, 1.1),
        ({"alpha": 2.0, "max_length": 20}, -0.1, 1.0),
        ({"gamma": 0, "zeta": 1}, 0.0, 1.0),
    ],
    ids=["default", "both", "alpha", "neither"],
)
def test_clipped_softmax(options, gamma, zeta, causal) -> None:
    mixer = build("quantizable", DIM, HEADS, causal=causal, **options)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, gamma, zeta), tokens(5, DIM))


@pytest.mark.tier("T2", "mixer:quantizable")
@pytest.mark.parametrize("scope", ["token", "head", "unconditional"])
@pytest.mark.parametrize("gate", ["linear", "mlp", "mlp2", "all_features"])
def test_gates(gate, scope) -> None:
    mixer = build("quantizable", DIM, HEADS, gamma=-0.1, gate=gate, gate_scope=scope)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, -0.1, 1.0), tokens(4, DIM))


@pytest.mark.parametrize("scope", ["head", "unconditional"])
def test_the_contract_of_other_scopes(scope) -> None:
    report = attnlab.check("quantizable", options={"gate": "mlp", "gate_scope": scope})
    assert report.passed, str(report)


def test_gates_a_head_read_the_future() -> None:
    with pytest.raises(UnsupportedError, match="causal=True"):
        create_mixer("quantizable", 8, 2, gate="linear", gate_scope="head", causal=True)


@pytest.mark.parametrize("gate", ["linear", "mlp", "all_features"])
def test_a_trained_network_begins_as_it_was(gate) -> None:
    torch.manual_seed(0)
    plain = create_mixer("softmax", 32, 4)
    gated = create_mixer("quantizable", 32, 4, gamma=0, gate=gate, gate_init=0.4, pretrained=True)
    missing = gated.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.startswith("gate.") for name in missing.missing_keys) and not missing.unexpected_keys
    x = torch.randn(2, 6, 32)
    with record(gated) as tape:
        y = gated(x)
    assert float((tape["gates"] - 0.4).detach().abs().max()) < 0.05
    assert float((y - plain(x)).detach().abs().max()) < 0.15 * float(y.detach().abs().max())
    torch.testing.assert_close(y, _definition_free(gated, x, tape["gates"]))


def _definition_free(mixer, x: Tensor, gates: Tensor) -> Tensor:
    """Softmax attention with recorded gates over their initial value."""
    with record(mixer) as tape:
        mixer(x)
    return mixer.out_proj((tape["mixed"] * (gates / 0.4).transpose(1, 2)[..., None]).transpose(1, 2).flatten(2))


def test_a_head_can_do_nothing() -> None:
    """With finite logits a clipped row is exactly 0 where a softmax spreads over everything."""
    mixer, x = create_mixer("quantizable", 8, 1, gamma=-0.3), torch.randn(1, 5, 8)
    torch.nn.init.zeros_(mixer.q_proj.weight)  # all weights 1 / 5, less than gamma takes
    assert (mixer.mixing_matrix(x) == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.1}, "gamma: expected at most 0"),
        ({"zeta": 0.9}, "zeta: expected at least 1"),
        ({"gamma": -0.1, "alpha": 4}, "alpha: expected None with gamma"),
        ({"alpha": 4}, "max_length: expected a positive integer with alpha=4, got None"),
        ({"max_length": 40}, "max_length: expected None without alpha, got 40"),
        ({"pretrained": True}, "pretrained: expected a gate to rescale"),
        ({"gate": "mlp", "gate_init": 0.0, "pretrained": True}, "gate_init: expected a number between 0 and 1"),
        ({"gate_scope": "heads"}, "gate_scope: expected one of"),
        ({"gate": "linaer"}, "gate: expected one of"),
        ({"gate": "linear", "gate_scope": "heads"}, "gate_scope: expected one of"),
        ({"gate": "linear", "gate_init": 1.0}, "gate_init: expected a number between 0 and 1"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("quantizable", 8, 2, **options)


def test_outliers_by_hand() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    x[0, 1, 2] = -40.0
    mask = torch.tensor([[True, True, False, True], [False, True, True, False], [False] * 4])
    norms, tails = inf_norm(x, mask=mask), kurtosis(x, mask=mask)
    for b in range(2):
        entries = [float(e) for token, real in zip(x[b], mask[b], strict=True) if real for e in token]
        mean, spread = statistics.fmean(entries), statistics.pstdev(entries)
        assert norms[b].item() == max(abs(e) for e in entries)
        assert tails[b].item() == pytest.approx(statistics.fmean([((e - mean) / spread) ** 4 for e in entries]), rel=1e-12)
    assert norms[2] == 0.0 and tails[2] == 0.0
    assert norms[0] == 40.0 and tails[0] > 12.0
    assert kurtosis(torch.randn(1, 400, 400)).item() == pytest.approx(3.0, abs=0.05)
