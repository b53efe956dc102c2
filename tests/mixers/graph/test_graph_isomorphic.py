"""Graph isomorphic attention by its definition, and the shapings of its adjacency."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import check, create_mixer
from attnlab.mixers.graph.adjacency import SHAPINGS, Shaping
from mixers.definition import assert_defined_by, build, tokens
from mixers.graph_definition import adjacency, perceptron, shape_row

LAWS = [
    "padding_inside",
    "padding_right_equals_shorter",
    "empty_rows_pair_mask",
    "causality_gradient",
    "streaming_splits",
    "streaming_padding",
    "precision_float32",
    "dtype_device_options",
]  # what the options can break


def _definition(mixer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    graph, width = adjacency(mixer, x * mask.unsqueeze(-1), mask), mixer.head_dim
    outputs = []
    for e in range(x.shape[0]):
        for i in range(x.shape[1]):
            heads = []
            for h in range(mixer.num_heads):
                part = slice(h * width, (h + 1) * width)
                z = mixer.epsilon[h, 0, 0] * x[e, i, part]
                for j, weight in graph[e, h, i].items():
                    z = z + weight * x[e, j, part]
                head = perceptron(mixer.mlp, h, z)
                if mixer.head_scale is not None:
                    centred = head - head.mean()
                    head = centred / torch.sqrt((centred**2).mean() + 1e-5)
                    head = head * mixer.head_scale[h, 0] + mixer.head_shift[h, 0]
                    head = head * (0.6 * math.exp(-0.3 * 3) + 0.2)  # 1 - lambda at first, in layer 3
                heads.append(head)
            outputs.append(mixer.out_proj(torch.cat(heads)) * mask[e, i])
    return torch.stack(outputs).view_as(x)


@pytest.mark.tier("T2", "mixer:graph_isomorphic")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", sorted(SHAPINGS))
def test_graph_isomorphic(name, causal) -> None:
    options = {"adjacency": name, "fraction": 0.5, "threshold": 0.15, "expansion": 3}
    mixer = build("graph_isomorphic", 6, 2, causal=causal, **options)
    assert_defined_by(mixer, lambda x: _definition(mixer, x), tokens(5, 6))


@pytest.mark.tier("T2", "mixer:graph_isomorphic")
@pytest.mark.parametrize(
    "options",
    [
        {"sharpening": 1.5, "temperature": 0.7},
        {"differential": True, "layer": 3},
        {"differential": True, "layer": 3, "head_norm": True, "adjacency": "silu"},
        {"score": "mlp", "score_hidden": 8},
        {"score": "mlp", "score_hidden": 8, "normalizer": "identity", "adjacency": "softplus", "epsilon": 1.0},
    ],
    ids=str,
)
def test_its_options(options) -> None:
    mixer = build("graph_isomorphic", 6, 2, causal=True, **options)
    assert_defined_by(mixer, lambda x: _definition(mixer, x), tokens(5, 6))


@pytest.mark.tier("T2", "mixer:graph_isomorphic")
@pytest.mark.parametrize("name", ["sigmoid", "top_k"])
def test_masked_tokens_are_no_nodes(name) -> None:
    mixer = build("graph_isomorphic", 6, 2, adjacency=name, fraction=0.5)
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    assert_defined_by(mixer, lambda x: _definition(mixer, x, mask), tokens(5, 6), mask=mask)


@pytest.mark.parametrize(
    "options",
    [
        {"adjacency": "top_k", "fraction": 0.4},
        {"adjacency": "flow", "sharpening": 1.5},
        {"score": "mlp", "score_hidden": 8, "normalizer": "identity", "adjacency": "softplus"},
        {"differential": True, "layer": 3, "head_norm": True, "adjacency": "sharp_softplus"},
    ],
    ids=str,
)
def test_every_form_keeps_the_laws(options) -> None:
    report = check("graph_isomorphic", options=options, only=LAWS)
    assert report.passed, str(report)


def test_it_streams_with_positions_in_both_pairs() -> None:
    mixer = build("graph_isomorphic", 8, 2, causal=True, differential=True, position="rotary")
    x = tokens(9, 8).detach()
    first, state = mixer.extend(x[:, :4], mixer.init_state(2))
    second, _ = mixer.extend(x[:, 4:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), mixer(x), rtol=1e-10, atol=1e-10)
    assert state["k"].shape == (2, 2, 4, 8)
    assert state["v"].shape == (2, 2, 4, 4)


@pytest.mark.parametrize("layer", [0, 3])
def test_lambda_at_first(layer) -> None:
    mixer = create_mixer("graph_isomorphic", 8, 2, differential=True, layer=layer)
    assert float(mixer.difference.detach()) == pytest.approx(0.8 - 0.6 * math.exp(-0.3 * layer))


def test_top_k_takes_the_first_of_equal_ones() -> None:
    even = torch.full((1, 1, 1, 10), 0.1)
    chosen = Shaping("top_k", fraction=0.3)(even, None)
    assert chosen[0, 0, 0].tolist() == [1.0] * 3 + [0.0] * 7
    assert [float(a) for a in shape_row([torch.tensor(0.1)] * 10, "top_k", f=0.3)] == chosen[0, 0, 0].tolist()
    only = torch.arange(10).view(1, 1, 1, 10) >= 8
    assert Shaping("top_k", fraction=0.9)(even, only)[0, 0, 0].tolist() == [0.0] * 8 + [1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adjacency": "relus"}, "did you mean 'relu'"),
        ({"sharpness": 0.0}, "sharpness"),
        ({"fraction": 1.5}, "fraction"),
        ({"score": "cosine"}, "score"),
        ({"score": "mlp", "score_hidden": 7}, "score_hidden"),
        ({"score": "mlp", "differential": True}, "score"),
        ({"score": "mlp", "position": "rotary"}, "score"),
        ({"normalizer": "sigmoid"}, "normalizer"),
        ({"temperature": 0.0}, "temperature"),
        ({"layer": -1}, "layer"),
        ({"expansion": 0}, "expansion"),
        ({"head_norm": True}, "head_norm"),
        ({"head_dim": 3}, "head_dim"),
        ({"num_kv_heads": 1}, "num_kv_heads"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("graph_isomorphic", 8, 2, **options)
