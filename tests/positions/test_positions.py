"""Positions: definitions, and backends that agree."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab import Tokens, UnknownNameError, UnsupportedError, create_mixer
from attnlab.positions import create_position, positions
from attnlab.positions.alibi import alibi_slopes
from attnlab.positions.convolutional import ConvolutionalPosition
from attnlab.positions.log_cpb import log_offsets
from attnlab.positions.relative import relative_by_gather, relative_by_skew


@pytest.mark.tier("T2", "position:rotary")
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_products_depend_on_the_distance_alone(interleaved) -> None:
    rotary = create_position("rotary", 1, 8, {"interleaved": interleaved})
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(i: int, j: int) -> float:
        return float((rotary.encode(q, torch.tensor([[i]])) * rotary.encode(k, torch.tensor([[j]]))).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), rel=1e-5)
    assert product(7, 3) != pytest.approx(product(7, 4), rel=1e-5)
    assert product(5, 5) == pytest.approx(float((q * k).sum()), rel=1e-6)


@pytest.mark.tier("T2", "position:rotary")
def test_rotary_is_the_complex_rotation() -> None:
    rotary = create_position("rotary", 1, 4, {"base": 100.0, "interleaved": True})
    x = torch.randn(1, 1, 3, 4)
    turned = rotary.encode(x, torch.arange(3)[None])
    angles = torch.arange(3)[:, None] * torch.tensor([1.0, 100.0**-0.5])
    expected = torch.view_as_complex(x.view(1, 1, 3, 2, 2)) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.view_as_real(expected).flatten(-2))


def test_a_fraction_leaves_the_rest() -> None:
    x = torch.randn(1, 1, 3, 8)
    turned = create_position("rotary", 1, 8, {"fraction": 0.5}).encode(x, torch.arange(3)[None])
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.equal(turned[..., :4], x[..., :4])


@pytest.mark.tier("T2", "position:alibi")
def test_alibi_slopes() -> None:
    assert alibi_slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    bias = create_position("alibi", 2, 4).bias(torch.zeros(1, 2, 2, 4), 3, causal=True, grid=None)
    torch.testing.assert_close(bias[0, 0], -(2**-4) * torch.tensor([[1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6))
def test_gather_and_skew_agree(n: int, m: int, reach: int) -> None:
    q = torch.randn(2, 3, n, 4, dtype=torch.float64)
    table = torch.randn(3, 2 * reach + 1, 4, dtype=torch.float64)
    torch.testing.assert_close(relative_by_skew(q, table, m), relative_by_gather(q, table, m), rtol=1e-12, atol=1e-12)


@pytest.mark.tier("T2", "position:relative")
def test_relative_reads_the_vector_of_the_distance() -> None:
    q, table = torch.randn(1, 1, 4, 3), torch.randn(1, 5, 3)
    logits = relative_by_gather(q, table, 4)
    for i in range(4):
        for j in range(4):
            torch.testing.assert_close(logits[0, 0, i, j], q[0, 0, i] @ table[0, max(-2, min(2, j - i)) + 2])


@pytest.mark.tier("T2", "position:log_cpb")
def test_log_offsets() -> None:
    offsets = log_offsets((2, 3))
    assert offsets.shape == (6, 6, 2)
    torch.testing.assert_close(offsets, -offsets.transpose(0, 1))
    # cell 5 = (1, 2) against cell 0 = (0, 0): both axes span the grid, 8 -> log2(9) / 3
    torch.testing.assert_close(offsets[5, 0], torch.full((2,), math.log2(9.0) / 3.0))


@pytest.mark.parametrize("name", ["rotary", "alibi", "relative"])
def test_positions_stream(name) -> None:
    mixer = create_mixer("softmax", 16, 2, causal=True, position=name).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    first, state = mixer.extend(x[:, :4], mixer.init_state(1))
    second, _ = mixer.extend(x[:, 4:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), mixer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", positions.names())
def test_every_position_is_taken_by_name(name) -> None:
    mixer = create_mixer("softmax", 16, 2, position=name)
    x = torch.randn(2, 6, 16)
    y = mixer(x, grid=(2, 3))
    y.sum().backward()
    assert torch.isfinite(y).all()
    moved = mixer(x.flip(1), grid=(2, 3)).flip(1)
    assert torch.allclose(moved, y, atol=1e-6) == (name in ("none", "alibi", "absolute_offsets"))  # these see no direction


@pytest.mark.parametrize("name", ["rotary", "alibi", "relative"])
def test_two_sequences_have_no_common_positions(name) -> None:
    mixer = create_mixer("softmax", 16, 2, position=name)
    with pytest.raises(UnsupportedError, match="no common positions"):
        mixer(torch.randn(1, 3, 16), torch.randn(1, 5, 16))


def test_log_cpb_needs_its_grid() -> None:
    with pytest.raises(ValueError, match="rank 2"):
        create_mixer("softmax", 16, 2, position="log_cpb")(torch.randn(1, 6, 16))


def test_convolutional_position_does_not_read_padding() -> None:
    position = ConvolutionalPosition(4)
    x = torch.randn(1, 6, 4)
    mask = torch.tensor([[True, True, False, True, True, True]])
    x = x.masked_fill(~mask[..., None], 0.0)
    out = position(Tokens(x, mask=mask, grid=(2, 3))).x
    assert (out[0, 2] == 0).all()
    torch.testing.assert_close(position(Tokens(x, grid=(2, 3))).x[mask], out[mask])


def test_bad_options() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'rotary'"):
        create_position("rotery", 2, 4)
    with pytest.raises(ValueError, match="method"):
        create_position("relative", 2, 4, {"method": "roll"})
    with pytest.raises(ValueError, match="fraction"):
        create_position("rotary", 2, 4, {"fraction": 0.1})
