"""Graph aggregation attention by its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab import check, create_mixer
from attnlab.mixers.graph import graph_aggregation
from mixers.definition import assert_defined_by, build, split_heads, tokens
from mixers.graph_definition import adjacency, perceptron


def _definition(mixer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    graph, values = adjacency(mixer, x * mask.unsqueeze(-1), mask), split_heads(mixer.v_proj(x), mixer.num_heads)
    outputs = []
    for e in range(x.shape[0]):
        for i in range(x.shape[1]):
            if not mask[e, i]:
                outputs.append(torch.zeros_like(x[e, i]))
                continue
            heads = []
            for h, v in enumerate(values):
                messages = [weight * v[e, j] for j, weight in graph[e, h, i].items()]
                total, mean = sum(messages), sum(messages) / len(messages)
                largest = messages[0]
                for message in messages[1:]:
                    largest = torch.maximum(largest, message)
                spread = sum((message - mean) ** 2 for message in messages) / len(messages)
                heads.append(perceptron(mixer.mlp, h, torch.cat((total, mean, largest, spread))))
            outputs.append(mixer.out_proj(torch.cat(heads)))
    return torch.stack(outputs).view_as(x)


@pytest.mark.tier("T2", "mixer:graph_aggregation")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"normalizer": "softmax", "adjacency": "sigmoid", "threshold": 0.2}, {"differential": True, "sharpening": 2.0}],
    ids=str,
)
def test_graph_aggregation(options, causal) -> None:
    mixer = build("graph_aggregation", 6, 2, causal=causal, **options)
    assert_defined_by(mixer, lambda x: _definition(mixer, x), tokens(5, 6))


@pytest.mark.tier("T2", "mixer:graph_aggregation")
def test_masked_tokens_are_no_neighbours() -> None:
    mixer = build("graph_aggregation", 6, 2)
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    assert_defined_by(mixer, lambda x: _definition(mixer, x, mask), tokens(5, 6), mask=mask)


def test_the_relu_graph_keeps_the_laws() -> None:
    options = {"adjacency": "relu", "normalizer": "softmax", "threshold": 0.1}
    laws = ["padding_inside", "empty_rows", "empty_rows_pair_mask", "causality_gradient", "precision_float32"]
    report = check("graph_aggregation", options=options, only=laws)
    assert report.passed, str(report)


@pytest.mark.parametrize(("options", "message"), [({"expansion": 0}, "expansion"), ({"adjacency": "gelu"}, "adjacency")])
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("graph_aggregation", 8, 2, **options)


def test_messages_in_blocks_are_messages_at_once(monkeypatch) -> None:
    mixer, x = build("graph_aggregation", 8, 2, causal=True), tokens(7, 8)

    def measured() -> list[torch.Tensor]:
        y = mixer(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()], allow_unused=True)]

    whole = measured()
    monkeypatch.setattr(graph_aggregation, "_BLOCK", 2 * 2 * 7 * 4)  # two rows
    for ours, theirs in zip(measured(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
