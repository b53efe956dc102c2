"""Linear attention, Lightning, TransNormer and DeltaNet by their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens


@pytest.mark.tier("T2", "mixer:linear")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", ["elu", "exp"])
def test_linear(causal, feature_map) -> None:
    mixer = build("linear", causal=causal, feature_map=feature_map)
    phi = {"elu": lambda t: F.elu(t) + 1, "exp": torch.exp}[feature_map]

    def definition(x: Tensor) -> Tensor:
        heads = []
        for q, k, v in zip(*(split_heads(p(x), 3) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)), strict=True):
            weights = phi(q) @ phi(k).transpose(1, 2)
            weights = weights.tril() if causal else weights
            heads.append(weights @ v / weights.sum(-1, keepdim=True))
        return mixer.out_proj(torch.cat(heads, -1))

    assert_defined_by(mixer, definition, tokens())


def _decayed(q: Tensor, k: Tensor, v: Tensor, slope: float) -> Tensor:
    """Token by token: KV <- lambda KV + k v^T, o = q KV."""
    state = torch.zeros(q.shape[0], q.shape[2], v.shape[2], dtype=q.dtype)
    rows = []
    for i in range(q.shape[1]):
        state = math.exp(-slope) * state + k[:, i, :, None] * v[:, i, None, :]
        rows.append((q[:, i, None, :] @ state)[:, 0])
    return torch.stack(rows, 1)


def _srms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.tier("T2", "mixer:lightning")
@pytest.mark.parametrize("decay", ["alibi", "none"])
def test_lightning(decay) -> None:
    mixer = build("lightning", 12, 4, decay=decay, activation="silu")
    slopes = [2 ** (-8 * (h + 1) / 4) if decay == "alibi" else 0.0 for h in range(4)]

    def definition(x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, 4) for part in mixer.in_proj(x).chunk(3, -1))
        heads = [_decayed(F.silu(q[h]), F.silu(k[h]), v[h], slopes[h]) for h in range(4)]
        return mixer.out_proj(_srms(torch.cat(heads, -1)))

    assert_defined_by(mixer, definition, tokens())


@pytest.mark.tier("T2", "mixer:transnormer")
@pytest.mark.parametrize("layer", [0, 2])
def test_transnormer(layer) -> None:
    mixer = build("transnormer", 12, 2, layer=layer, num_layers=4)
    slopes = [2 ** (-8 * (h + 1) / 2) * (1 - layer / 3 + 1e-5) for h in range(2)]

    def encode(x: Tensor, head: int) -> Tensor:
        if layer:
            return x
        theta = mixer.lrpe.theta[head, 0]
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * theta
        return torch.cat((x * angle.cos(), x * angle.sin()), -1)

    def definition(x: Tensor) -> Tensor:
        q, k, v, u = mixer.in_proj(x).chunk(4, -1)
        q, k, v = split_heads(F.silu(q), 2), split_heads(F.silu(k), 2), split_heads(v, 2)
        heads = [_decayed(encode(q[h], h), encode(k[h], h), v[h], slopes[h]) for h in range(2)]
        return mixer.out_proj(u * _srms(torch.cat(heads, -1)))

    # slopes are kept in float32, whose rounding is theirs and ours
    mixer.log_decay = -torch.tensor(slopes, dtype=torch.float64)
    assert_defined_by(mixer, definition, tokens())


def test_transnormer_uses_lrpe_in_the_first_layer_alone() -> None:
    assert create_mixer("transnormer", 8, 2).lrpe is not None
    assert create_mixer("transnormer", 8, 2, layer=1, num_layers=2).lrpe is None
    with pytest.raises(ValueError, match="layer"):
        create_mixer("transnormer", 8, 2, layer=2, num_layers=2)


def _short_conv(x: Tensor, weight: Tensor) -> Tensor:
    width = weight.shape[1]
    rows = []
    for t in range(x.shape[1]):
        taps = [weight[:, s] * x[:, t - (width - 1) + s] for s in range(width) if t - (width - 1) + s >= 0]
        rows.append(sum(taps))
    return torch.stack(rows, 1)


@pytest.mark.tier("T2", "mixer:delta_net")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": True, "negative_eigenvalues": True},
        {"conv_size": 0, "beta": "one", "expand_v": 2.0},
        {"qk_activation": "elu", "qk_norm": "sum", "expand_k": 0.5},
        {"decay": True},
    ],
    ids=["default", "gated", "bare", "elu-sum", "decaying"],
)
def test_delta_net(options) -> None:
    mixer = build("delta_net", 12, 2, **options)
    activation = {"silu": F.silu, "elu": lambda t: F.elu(t) + 1}[options.get("qk_activation", "silu")]

    def normalize(x: Tensor) -> Tensor:
        if options.get("qk_norm") == "sum":
            return x / x.sum(-1, keepdim=True)
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def definition(x: Tensor) -> Tensor:
        parts = {"q": mixer.q_proj(x), "k": mixer.k_proj(x), "v": mixer.v_proj(x)}
        if options.get("conv_size") != 0:
            parts = {name: _short_conv(part, mixer.convs[name].weight) for name, part in parts.items()}
        v = split_heads(F.silu(parts["v"]), 2)
        q, k = (split_heads(activation(parts[name]), 2) for name in "qk")
        heads = []
        for h in range(2):
            state = torch.zeros(x.shape[0], q[h].shape[2], v[h].shape[2], dtype=x.dtype)
            rows = []
            for t in range(x.shape[1]):
                qt, kt = normalize(q[h][:, t]), normalize(k[h][:, t])
                beta = torch.ones(x.shape[0], 1, dtype=x.dtype)
                if "beta" not in options:
                    beta = torch.sigmoid(x[:, t] @ mixer.b_proj.weight[h])[:, None]
                if options.get("negative_eigenvalues"):
                    beta = 2 * beta
                if options.get("decay"):
                    step = F.softplus(x[:, t] @ mixer.decay.proj.weight[h] + mixer.decay.bias[h])
                    state = torch.exp(-mixer.decay.A_log[h].exp() * step)[:, None, None] * state
                held = (kt[:, None] @ state)[:, 0]
                state = state + kt[:, :, None] * (beta * (v[h][:, t] - held))[:, None]
                rows.append((qt[:, None] @ state)[:, 0] / math.sqrt(qt.shape[-1]))
            o = torch.stack(rows, 1)
            o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.out_norm.weight
            if options.get("gate"):
                o = o * F.silu(split_heads(mixer.g_proj(x), 2)[h])
            heads.append(o)
        return mixer.out_proj(torch.cat(heads, -1))

    assert_defined_by(mixer, definition, tokens())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {"feature_map": "tanh"}, "feature_map"),
        ("linear", {"num_kv_heads": 1}, "num_kv_heads"),
        ("linear", {"position": "rotary"}, "position"),
        ("lightning", {"activation": "gelu"}, "activation"),
        ("lightning", {"decay": "learned"}, "decay"),
        ("delta_net", {"qk_norm": "l1"}, "qk_norm"),
        ("delta_net", {"expand_k": 0.1}, "expand_k"),
    ],
)
def test_bad_options(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, 3, **options)
