"""Positions: definitions, and backends that agree."""

from __future__ import annotations

import math

import pytest
import torch

from attnlab import Tokens, UnknownNameError, UnsupportedError, create_mixer, list_mixers, mixer_info, use_backend
from attnlab.positions import create_position, positions
from attnlab.positions.alibi import alibi_slopes
from attnlab.positions.convolutional import ConvolutionalPosition
from attnlab.positions.log_cpb import log_offsets


def _perturb(module: torch.nn.Module) -> None:
    """Random parameters, so that none hides behind an initial zero or one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


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
    bias = bias.expanded(torch.zeros(1, 2, 2, 4), 3, 1.0)
    torch.testing.assert_close(bias[0, 0], -(2**-4) * torch.tensor([[1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]))


@pytest.mark.tier("T2", "position:relative")
@pytest.mark.parametrize(("n", "m"), [(4, 4), (2, 5), (5, 5)])
def test_relative_reads_the_vector_of_the_distance(n, m) -> None:
    position = create_position("relative", 1, 3, {"max_distance": 2})
    q = torch.randn(1, 1, n, 3)
    logits = position.bias(q, m, causal=False, grid=None).expanded(q, m, 1.0)
    for i in range(n):
        for j in range(m):
            distance = max(-2, min(2, j - (i + m - n)))
            torch.testing.assert_close(logits[0, 0, i, j], q[0, 0, i] @ position.table[0, distance + 2])


@pytest.mark.tier("T2", "position:log_cpb")
def test_log_offsets() -> None:
    offsets = log_offsets((2, 3))
    assert offsets.shape == (15, 2)
    torch.testing.assert_close(offsets, -offsets.flip(0))
    # the last: cell (1, 2) against cell (0, 0), both axes span the grid, 8 -> log2(9) / 3
    torch.testing.assert_close(offsets[-1], torch.full((2,), math.log2(9.0) / 3.0))


@pytest.mark.parametrize("name", [name for name in positions.names() if not positions.get(name).factory.reads_future])
def test_positions_stream(name) -> None:
    known = {option.name for option in positions.info(name).options}
    options = {key: value for key, value in {"rank": 1, "span": 9, "size": 9}.items() if key in known}
    mixer = create_mixer("softmax", 16, 2, causal=True, position=name, position_options=options).double()
    _perturb(mixer)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    first, state = mixer.extend(x[:, :4], mixer.init_state(1))
    second, _ = mixer.extend(x[:, 4:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), mixer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", positions.names())
def test_every_position_is_taken_by_name(name) -> None:
    mixer = create_mixer("softmax", 16, 2, position=name)
    _perturb(mixer)
    x = torch.randn(2, 6, 16)
    y = mixer(x, grid=(2, 3))
    y.sum().backward()
    assert torch.isfinite(y).all()
    moved = mixer(x.flip(1), grid=(2, 3)).flip(1)
    assert torch.allclose(moved, y, atol=1e-6) == (name in ("none", "alibi", "absolute_offsets"))  # these see no direction


def _with_position() -> list[str]:
    """The mixers of the dense family that take a position by name."""
    names = list_mixers(family="dense", tokens_option=None)
    return [name for name in names if any(option.name == "position" for option in mixer_info(name).options)]


@pytest.mark.parametrize("mixer", _with_position())
def test_every_dense_mixer_takes_every_position(mixer) -> None:
    grid = (2, 3) if 2 in mixer_info(mixer).supports.grid else None
    for name in positions.names():
        line = {"rank": 1} if grid is None and "rank" in {option.name for option in positions.info(name).options} else None
        built = create_mixer(mixer, 16, 2, position=name, position_options=line, **dict(mixer_info(mixer).example)).double()
        _perturb(built)
        x = torch.randn(1, 6, 16, dtype=torch.float64)
        y = built(x, grid=grid)
        assert torch.isfinite(y).all(), name
        with use_backend("reference"):
            torch.testing.assert_close(built(x, grid=grid), y, rtol=1e-9, atol=1e-10)


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
    with pytest.raises(ValueError, match="max_distance"):
        create_position("relative", 2, 4, {"max_distance": 0})
    with pytest.raises(ValueError, match="fraction"):
        create_position("rotary", 2, 4, {"fraction": 0.1})
