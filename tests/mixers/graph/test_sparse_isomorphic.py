"""The sparse GIN adapter by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, split_heads, tokens
from mixers.graph_definition import perceptron, shape_row


def _definition(mixer, x: Tensor, name: str) -> Tensor:
    heads = mixer.num_heads
    qs, ks, vs = (split_heads(layer(x), heads) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    outputs = []
    for e in range(x.shape[0]):
        for i in range(x.shape[1]):
            keys = range(i + 1 if mixer.causal else x.shape[1])
            rows, read = [], []
            for q, k, v in zip(qs, ks, vs, strict=True):
                weights = [torch.exp((q[e, i] * k[e, j]).sum() / math.sqrt(q.shape[-1])) for j in keys]
                rows.append([weight / sum(weights) for weight in weights])
                read.append(sum(weight * v[e, j] for j, weight in zip(keys, rows[-1], strict=True)))
            mean = [sum(row[j] for row in rows) / heads for j in keys]
            shaped = shape_row(mean, name, t=0.15, b=10.0, f=0.5)
            z = mixer.epsilon * x[e, i] + sum(weight * x[e, j] for j, weight in zip(keys, shaped, strict=True))
            outputs.append(mixer.out_proj(torch.cat(read)) + mixer.scale * perceptron(mixer.mlp, 0, z))
    return torch.stack(outputs).view_as(x)


@pytest.mark.tier("T2", "mixer:sparse_isomorphic")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["sharp_softplus", "top_k"])
def test_sparse_isomorphic(name, causal) -> None:
    options = {"adjacency": name, "threshold": 0.15, "fraction": 0.5}
    mixer = build("sparse_isomorphic", 6, 2, causal=causal, **options)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, name), tokens(5, 6))


def test_without_scale_it_is_softmax_attention() -> None:
    mixer, plain = create_mixer("sparse_isomorphic", 8, 2, scale=0.0), create_mixer("softmax", 8, 2)
    plain.load_state_dict({key: value for key, value in mixer.state_dict().items() if "proj" in key})
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(mixer(x), plain(x))


def test_frozen_attention_leaves_the_adapter() -> None:
    mixer = create_mixer("sparse_isomorphic", 8, 2)
    mixer.freeze_attention()
    learned = {name.split(".")[0] for name, parameter in mixer.named_parameters() if parameter.requires_grad}
    assert learned == {"scale", "epsilon", "mlp"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"expansion": 0}, "expansion"), ({"adjacency": "gelu"}, "adjacency"), ({"num_kv_heads": 1}, "num_kv_heads")],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("sparse_isomorphic", 8, 2, **options)
