"""Scans in several orders by their definition: the mechanism on permuted tokens, brought back and merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab import UnsupportedError, check, create_mixer
from mixers.definition import assert_defined_by, build, tokens

SMALL = {"state_dim": 2, "conv_size": 2}
LAWS = ["padding_inside", "causality_gradient", "reads_the_future", "streaming_splits", "mixing_matrix", "grid_ranks", "packed*"]


def _paths(order: str, h: int, w: int) -> list[list[int]]:
    """The visited cells, written down cell by cell."""
    rows = [(i, j) for i in range(h) for j in range(w)]
    columns = [(i, j) for j in range(w) for i in range(h)]
    forward = {
        "raster": [rows],
        "cross": [rows, columns],
        "continuous": [
            [(i, j if i % 2 == 0 else w - 1 - j) for i, j in rows],
            [(i if j % 2 == 0 else h - 1 - i, j) for i, j in columns],
        ],
    }[order]
    paths = forward + [path[::-1] for path in forward]
    return [[i * w + j for i, j in path] for path in paths]


def _merge(mixer, outputs: list[Tensor], x: Tensor) -> Tensor:
    if mixer.merge == "concat":
        return mixer.join(torch.cat(outputs, -1))
    if mixer.merge == "gate":
        gates = torch.sigmoid(x @ mixer.gate.weight.mT + mixer.gate.bias)
        return sum(gates[..., k, None] * y for k, y in enumerate(outputs))
    return sum(outputs) / (len(outputs) if mixer.merge == "mean" else 1)


@pytest.mark.tier("T2", "mixer:multi_scan")
@pytest.mark.parametrize(
    ("order", "merge", "shared"),
    [("raster", "sum", False), ("cross", "concat", False), ("continuous", "gate", False), ("cross", "mean", True)],
)
def test_multi_scan(order, merge, shared) -> None:
    mixer = build("multi_scan", 6, 1, mixer_options=SMALL, order=order, merge=merge, shared=shared)

    def definition(x: Tensor) -> Tensor:
        outputs = []
        for k, path in enumerate(_paths(order, 3, 4)):
            y = mixer.scans[0 if shared else k](torch.stack([x[:, token] for token in path], 1))
            outputs.append(torch.stack([y[:, path.index(token)] for token in range(12)], 1))
        return _merge(mixer, outputs, x)

    assert_defined_by(mixer, definition, tokens(12, 6), grid=(3, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"order": "hilbert", "merge": "gate"},
        {"order": "cross", "bidirectional": False},
        {"order": "spectral_spatial", "rank": 3, "shared": True, "merge": "mean"},
        {"order": "windows", "window": 2, "merge": "concat"},
        {"mixer": "delta_net", "num_heads": 2, "mixer_options": {}, "rank": 1},
        {"mixer": "softmax", "mixer_options": {}, "order": "continuous", "shared": True},
    ],
    ids=lambda options: options.get("order", options.get("mixer")),
)
def test_contract_of_the_options(options) -> None:
    report = check("multi_scan", options=options, only=LAWS)
    assert report.passed, report


def test_a_causal_scan_is_the_mechanism() -> None:
    mixer = create_mixer("multi_scan", 8, causal=True, mixer_options=SMALL)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(mixer(x), mixer.scans[0](x))


def test_a_matrix_of_a_path_back_is_upper_triangular() -> None:
    mixer = create_mixer("multi_scan", 4, mixer_options=SMALL)
    matrix = mixer.mixing_matrix(torch.randn(1, 5, 4))
    heads = matrix.shape[1] // 2
    assert torch.equal(matrix[:, :heads], matrix[:, :heads].tril())
    assert torch.equal(matrix[:, heads:], matrix[:, heads:].triu())
    assert bool((matrix[:, heads:, 0, 1:] != 0).any())


def test_what_a_path_out_of_order_cannot_be() -> None:
    with pytest.raises(UnsupportedError, match="causal=True"):
        create_mixer("multi_scan", 8, causal=True, order="cross")
    with pytest.raises(UnsupportedError, match="grid of rank 1"):
        create_mixer("multi_scan", 8, order="cross", bidirectional=False)(torch.randn(1, 4, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "rank"),
        ({"merge": "max"}, "merge"),
        ({"order": "spiral"}, "order"),
        ({"order": "spectral_spatial"}, "rank 2"),
        ({"mixer": "pooling"}, "mixer: expected"),
        ({"bidirectional": False}, "bidirectional"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("multi_scan", 12, **options)
