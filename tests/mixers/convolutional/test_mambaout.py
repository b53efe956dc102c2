"""Gated convolution by its definition, and Mamba as one of its configurations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab import UnsupportedError, check, create_mixer
from attnlab.mixers.convolutional.mambaout import long_sequence_ratio
from mixers.definition import assert_defined_by, build, tokens

AS_MAMBA = {"activation": "silu", "conv_activation": "silu", "ssm": True, "bias": False}
AS_MAMBA |= {"expansion": 2, "conv_ratio": 2, "ssm_options": {"state_dim": 3}}


def _gated(mixer, x: Tensor, convolve) -> Tensor:
    """g, i and u in this order; only g is activated."""
    hidden, kept, convolved = mixer.sizes
    rows = mixer.in_proj(x)
    g, i, u = rows[..., :hidden], rows[..., hidden : hidden + kept], rows[..., hidden + kept :]
    assert u.shape[-1] == convolved
    return mixer.out_proj(0.5 * g * (1 + torch.erf(g / 2**0.5)) * torch.cat((i, convolve(u)), -1))


@pytest.mark.tier("T2", "mixer:mambaout")
@pytest.mark.parametrize("grid", [(3, 4), (1, 5), None])
def test_on_a_grid(grid) -> None:
    mixer = build("mambaout", 6, 1, kernel_size=3, conv_ratio=0.7)
    height, width = grid or (1, 7)

    def convolve(u: Tensor) -> Tensor:
        weight, rows = mixer.conv.weight[:, 0], []
        for t in range(height * width):
            total = mixer.conv.bias
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    y, x = t // width + dy, t % width + dx
                    if 0 <= y < height and 0 <= x < width:
                        total = total + weight[:, dy + 1, dx + 1] * u[:, y * width + x]
            rows.append(total)
        return torch.stack(rows, 1)

    x = tokens(height * width, 6)
    assert mixer.sizes == [16, 12, 4]
    assert_defined_by(mixer, lambda x: _gated(mixer, x, convolve), x, grid=grid)


@pytest.mark.tier("T2", "mixer:mambaout")
@pytest.mark.parametrize("causal", [True, False])
def test_along_a_sequence(causal) -> None:
    mixer = build("mambaout", 6, 1, kernel_size=5, rank=1, causal=causal, conv_bias=False)
    last = 4 if causal else 2

    def convolve(u: Tensor) -> Tensor:
        weight = mixer.conv.weight.reshape(-1, 5)
        around = [(t, k, t + k - last) for t in range(u.shape[1]) for k in range(5)]
        taps = [(t, weight[:, k] * u[:, s]) for t, k, s in around if 0 <= s < u.shape[1]]
        return torch.stack([sum(term for at, term in taps if at == t) for t in range(u.shape[1])], 1)

    assert_defined_by(mixer, lambda x: _gated(mixer, x, convolve), tokens(8, 6))


def test_with_the_state_space_it_is_mamba() -> None:
    mamba = build("mamba", 8, 1, state_dim=3)
    ours = create_mixer("mambaout", 8, causal=True, kernel_size=4, **AS_MAMBA).double()
    weights = mamba.state_dict()
    x_rows, gate_rows = weights["in_proj.weight"].chunk(2)
    ours.load_state_dict(weights | {"in_proj.weight": torch.cat((gate_rows, x_rows))}, strict=True)
    x = tokens(9, 8)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 3], mask[1, 7:] = False, False
    torch.testing.assert_close(ours(x, mask=mask), mamba(x, mask=mask), rtol=1e-12, atol=1e-12)
    y, state = ours.extend(x[:, :4], ours.init_state(2))
    torch.testing.assert_close(y, mamba(x)[:, :4], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state["ssm"], mamba.extend(x[:, :4], mamba.init_state(2))[1]["ssm"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options", [AS_MAMBA, {"ssm": True, "ssm_options": {"state_dim": 2}}, {"rank": 1}], ids=["mamba", "ssm", "rank_1"]
)
def test_contract_of_the_options(options) -> None:
    laws = ["padding_*", "causality_gradient", "reads_the_future", "streaming_*", "precision_float32", "grid_ranks"]
    report = check("mambaout", options=options | {"kernel_size": 3}, only=laws)
    assert report.passed, report


def test_initialisation() -> None:
    mixer = create_mixer("mambaout", 48)
    assert mixer.sizes == [128, 80, 48]
    assert float(mixer.in_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not any(float(layer.bias.detach().abs().max()) for layer in (mixer.in_proj, mixer.conv, mixer.out_proj))


def test_the_length_from_which_a_task_is_long() -> None:
    assert long_sequence_ratio(2304, 384) == 1.0
    assert long_sequence_ratio(196, 384) < 1 < long_sequence_ratio(4000, 384)
    n, d = 50, 7  # the linear maps of attention and MLP, and the two products with the n x n map
    linear, quadratic = 2 * n * (4 * d * d + 8 * d * d), 2 * 2 * n * n * d
    assert long_sequence_ratio(n, d) == pytest.approx(quadratic / linear)
    with pytest.raises(ValueError, match="num_tokens, dim"):
        long_sequence_ratio(0, 4)


def test_kernels_along_a_sequence_refuse_a_plane() -> None:
    with pytest.raises(UnsupportedError, match="rank 2"):
        create_mixer("mambaout", 4, rank=1)(torch.randn(1, 4, 4), grid=(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_ratio": 3.0}, "expansion, conv_ratio"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"rank": 3}, "rank"),
        ({"activation": "relu"}, "activation"),
        ({"conv_activation": "relu"}, "conv_activation"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("mambaout", 12, **options)
