"""Positions that read tables and MLPs by offset, by their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from attnlab import UnsupportedError, create_mixer
from attnlab.positions import create_position
from attnlab.positions.base import Position


def _perturbed(name: str, heads: int = 2, width: int = 4, **options: object) -> Position:
    position = create_position(name, heads, width, options).double()
    with torch.no_grad():
        for parameter in position.parameters():
            parameter.add_(torch.randn_like(parameter))
    return position


def _dense(position: Position, n: int, m: int, causal: bool = False, grid=None, of: str = "bias") -> Tensor:
    q = torch.zeros(1, position.num_heads, n, position.head_dim, dtype=torch.float64)
    return getattr(position, of)(q, m, causal=causal, grid=grid).expanded(q, m, 1.0)[0]


def _cells(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(side) for side in grid)))


@pytest.mark.tier("T2", "position:buckets")
@pytest.mark.parametrize("causal", [False, True])
def test_buckets(causal) -> None:
    position = _perturbed("buckets", num_buckets=8, max_distance=20)

    def bucket(offset: int) -> int:
        side = 8 if causal else 4
        distance = max(-offset, 0) if causal else abs(offset)
        exact = side // 2
        if distance >= exact:
            far = math.log(distance / exact) / math.log(20 / exact) * (side - exact)
            distance = min(exact + int(far), side - 1)
        return distance + (side if offset > 0 and not causal else 0)

    bias = _dense(position, 30, 30, causal)
    for i, j in itertools.product(range(30), range(30)):
        assert torch.equal(bias[:, i, j], position.table[:, bucket(j - i)])


@pytest.mark.tier("T2", "position:urpe")
@pytest.mark.parametrize("causal", [False, True])
def test_urpe_multiplies_the_normalised_map(causal) -> None:
    options = {"position": "urpe", "position_options": {"max_distance": 3}, "causal": causal}
    mixer = create_mixer("softmax", 8, 2, **options).double()
    with torch.no_grad():
        for parameter in mixer.position.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    q, k, _ = mixer.project(x)
    position = mixer.position
    for b, h, i in itertools.product(range(2), range(2), range(6)):
        seen = range(i + 1 if causal else 6)
        place = [max(-3, min(3, j - i)) + 3 for j in seen]
        logits = torch.stack([q[b, h, i] @ k[b, h, j] / 2 + position.shift[h, p] for j, p in zip(seen, place, strict=True)])
        expected = torch.softmax(logits, 0) * position.weight[h, place]
        torch.testing.assert_close(mixer.mixing_matrix(x)[b, h, i, : len(place)], expected)


@pytest.mark.tier("T2", "position:urpe")
def test_urpe_in_signed_log_buckets() -> None:
    position = _perturbed("urpe", buckets="log", num_buckets=16, max_distance=20)

    def bucket(offset: int) -> int:
        size = abs(offset)
        if size >= 4:
            size = min(4 + int(math.log(size / 4) / math.log(20 / 4) * 4), 7)
        return size if offset >= 0 else -size

    for of, table in (("bias", position.shift), ("factor", position.weight)):
        dense = _dense(position, 30, 30, of=of)
        assert table.shape == (2, 15)
        for i, j in itertools.product(range(30), range(30)):
            assert torch.equal(dense[:, i, j], table[:, bucket(j - i) + 7])


@pytest.mark.parametrize(
    "options", [{"buckets": "linear"}, {"num_buckets": 6}, {"buckets": "log", "max_distance": 8}, {"max_distance": 0}]
)
def test_bad_options_of_urpe(options) -> None:
    with pytest.raises(ValueError, match=f"{list(options)[-1]}: expected"):
        create_position("urpe", 2, 4, options)


def test_a_bias_alone_cannot_tell_positions_of_equal_tokens_apart_but_urpe_can() -> None:
    same = torch.randn(1, 1, 8).expand(1, 5, 8)
    for name, tells in (("relative", False), ("buckets", False), ("urpe", True)):
        mixer = create_mixer("softmax", 8, 2, position=name)
        with torch.no_grad():
            for parameter in mixer.position.parameters():
                parameter.add_(torch.randn_like(parameter))
        y = mixer(same)
        assert (float((y - y[:, :1]).detach().abs().max()) > 1e-3) == tells


@pytest.mark.tier("T2", "position:dynamic_mlp")
@pytest.mark.parametrize("grid", [(5,), (2, 3), (2, 1, 3)])
def test_dynamic_mlp(grid) -> None:
    position = _perturbed("dynamic_mlp", rank=len(grid), hidden=5)
    cells = _cells(grid)
    bias = _dense(position, len(cells), len(cells), grid=grid)
    for (i, a), (j, b) in itertools.product(enumerate(cells), enumerate(cells)):
        offset = torch.tensor([x - y for x, y in zip(a, b, strict=True)], dtype=torch.float64)
        torch.testing.assert_close(bias[:, i, j], position.mlp(offset))


@pytest.mark.tier("T2", "position:offset_table")
@pytest.mark.parametrize("direction", ["query_minus_key", "key_minus_query"])
@pytest.mark.parametrize("grid", [(3,), (3, 3)])
def test_offset_table(direction, grid) -> None:
    position = _perturbed("offset_table", rank=len(grid), size=3, direction=direction)
    cells = _cells(grid)
    bias = _dense(position, len(cells), len(cells), grid=grid)
    sign = 1 if direction == "query_minus_key" else -1
    for (i, a), (j, b) in itertools.product(enumerate(cells), enumerate(cells)):
        entry = tuple(sign * (x - y) + 2 for x, y in zip(a, b, strict=True))
        assert torch.equal(bias[:, i, j], position.table[(slice(None), *entry)])


def test_a_table_is_resized_to_the_grid() -> None:
    position = create_position("offset_table", 1, 4, {"size": 3}).double()
    with torch.no_grad():
        position.table.copy_(torch.arange(-2.0, 3.0)[None, :, None].expand(1, 5, 5))  # grows with the row offset
    bias = _dense(position, 25, 25, grid=(5, 5)).detach()
    assert float(bias[0, 24, 0]) == pytest.approx(2.0)  # four rows apart of four: the table's end
    assert float(bias[0, 0, 24]) == pytest.approx(-2.0)
    assert float(bias[0, 12, 12]) == pytest.approx(0.0)


@pytest.mark.tier("T2", "position:offset_table")
@pytest.mark.parametrize("grid", [(2,), (7,), (5, 2)])
def test_a_table_whose_offsets_are_clipped(grid) -> None:
    position = _perturbed("offset_table", rank=len(grid), size=3, other_sizes="clipped")
    cells = _cells(grid)
    bias = _dense(position, len(cells), len(cells), grid=grid)
    for (i, a), (j, b) in itertools.product(enumerate(cells), enumerate(cells)):
        entry = tuple(max(-2, min(2, x - y)) + 2 for x, y in zip(a, b, strict=True))
        assert torch.equal(bias[:, i, j], position.table[(slice(None), *entry)])


@pytest.mark.tier("T2", "position:lepe")
def test_lepe_is_a_convolution_of_the_values() -> None:
    mixer = create_mixer("softmax", 8, 2, position="lepe", num_kv_heads=1).double()
    plain = create_mixer("softmax", 8, 2, num_kv_heads=1).double()
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if not name.startswith("position")})
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    kernel, shift = mixer.position.conv.weight, mixer.position.conv.bias
    v = torch.cat([mixer.v_proj(x)] * 2, dim=-1).view(2, 3, 8)
    around = torch.zeros(2, 3, 8, dtype=torch.float64)
    for y, z, dy, dz in itertools.product(range(2), range(3), range(3), range(3)):
        if 0 <= y + dy - 1 < 2 and 0 <= z + dz - 1 < 3:
            around[y, z] += kernel[:, 0, dy, dz] * v[y + dy - 1, z + dz - 1]
    expected = plain(x) + (around + shift).view(1, 6, 8) @ mixer.out_proj.weight.mT
    torch.testing.assert_close(mixer(x, grid=(2, 3)), expected)
    with pytest.raises(UnsupportedError, match="mixes in later tokens"):
        create_mixer("softmax", 8, 2, position="lepe", causal=True)


@pytest.mark.tier("T2", "position:learned", "position:sinusoidal")
@pytest.mark.parametrize("name", ["learned", "sinusoidal"])
def test_absolute_positions_are_added_to_queries_and_keys(name) -> None:
    position = _perturbed(name, width=5)
    x = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    added = position.encode(x, torch.tensor([[4, 0, 7]])) - x
    for place, p in enumerate((4, 0, 7)):
        if name == "learned":
            expected = position.table[p]
        else:
            waves = [(math.sin, math.cos)[t % 2](p * 10000.0 ** (-2 * (t // 2) / 5)) for t in range(5)]
            expected = torch.tensor(waves, dtype=torch.float64) * 5**-0.5
        torch.testing.assert_close(added[:, :, place], expected.expand(2, 2, 5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["learned", "sinusoidal", "rotary"])
def test_padding_on_the_left_shifts_no_position(name) -> None:
    mixer = create_mixer("softmax", 8, 2, position=name).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    padded = torch.cat((torch.randn(1, 3, 8, dtype=torch.float64), x), dim=1)
    mask = torch.tensor([[False] * 3 + [True] * 4])
    torch.testing.assert_close(mixer(padded, mask=mask)[:, 3:], mixer(x))


def test_bad_options() -> None:
    for name, option, value in (
        ("buckets", "num_buckets", 3),
        ("buckets", "max_distance", 16),
        ("urpe", "max_distance", 0),
        ("dynamic_mlp", "rank", 0),
        ("offset_table", "size", 1),
        ("offset_table", "direction", "up"),
        ("lepe", "kernel_size", 2),
        ("learned", "max_length", 0),
    ):
        with pytest.raises(ValueError, match=option):
            create_position(name, 2, 4, {option: value})
    with pytest.raises(ValueError, match="max_length=4"):
        create_mixer("softmax", 8, 2, position="learned", position_options={"max_length": 4})(torch.randn(1, 5, 8))
