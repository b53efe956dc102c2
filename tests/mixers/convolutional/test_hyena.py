"""Hyena N-D by its definition, place by place."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import attnlab
from attnlab import UnsupportedError, create_mixer, record
from attnlab.mixers.convolutional.directions import corners, from_corners, to_one_corner
from mixers.definition import assert_defined_by, build, tokens

C, L = 3, 6
CORNERS = {1: [(), (0,)], 2: [(), (0, 1), (1,), (0,)]}


def _network(network, z: Tensor) -> Tensor:
    for layer in network.layers:
        z = torch.sin(network.frequency * (layer.weight @ z + layer.bias))
    return network.last.weight @ z


def _fall(window, axis: int, place: int) -> Tensor:
    if window.mode == "symmetric":
        return torch.exp(-window.rates[0].abs() * place)
    return torch.exp(-window.rates[axis].abs() * place / (L - 1))


def _kernel(mixer, place: tuple[int, ...]) -> Tensor:
    """(order - 1, C) at one place."""
    own = mixer.filter

    def windowed(window, h: Tensor, axes: list[tuple[int, int]]) -> Tensor:
        if window.mode == "none":
            return h
        fall = math.prod(_fall(window, axis, a) for axis, a in axes)
        fall = fall**0.5 if window.sqrt else fall
        return h * (fall + (0 if window.shift is None else window.shift))

    if own.kind == "product":
        parts = zip(own.networks, own.windows, place, strict=True)
        h = math.prod(windowed(window, _network(network, own.z[a]), [(0, a)]) for network, window, a in parts)
    else:
        h = windowed(own.windows[0], _network(own.networks[0], torch.cat([own.z[a] for a in place])), list(enumerate(place)))
    return mixer.scale * h.view(-1, C)


def _flip(place: tuple[int, ...], axes: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(grid[x] - 1 - p if x in axes else p for x, p in enumerate(place))


def _definition(mixer, x: Tensor, grid: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
    """``grid`` has as many sides as the mixer's rank."""
    rank, groups, out = len(grid), 4 if mixer.directions == "parallel" else 1, []
    places = list(itertools.product(*(range(side) for side in grid)))
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    kernels = {place: _kernel(mixer, place) for place in places}
    for example, real in zip(x, mask, strict=True):
        there = {place: bool(real[i]) for i, place in enumerate(places)}
        z = {place: mixer.in_proj(example[i]) * there[place] for i, place in enumerate(places)}
        short = {}
        for place in places:
            total = mixer.short_bias
            for tap in itertools.product(range(3), repeat=rank):
                at = tuple(p + t - (2 if mixer.causal else 1) for p, t in zip(place, tap, strict=True))
                if at in z:
                    total = total + mixer.short_weight[(slice(None), 0, *tap)] * z[at].repeat_interleave(groups)
            short[place] = total * there[place]
        outputs = []
        for group in range(groups):
            cut = {place: s.chunk(groups)[group].split(C) for place, s in short.items()}
            every = CORNERS[rank] if mixer.directions in ("4dir", "4dirp") else [()]
            for axes in every:
                v = {place: cut[place][-1] for place in places}
                for step in range(mixer.order - 1):
                    u = {place: v[place] * cut[place][mixer.order - 1 - step] for place in places}
                    turned = tuple(range(rank)) if mixer.directions == "seq" and step == 0 else axes
                    v = {}
                    for place in places:
                        corner, total = _flip(place, turned, grid), mixer.skip[step] * u[place]
                        for a in itertools.product(*(range(p + 1) for p in corner)):
                            behind = tuple(p - s for p, s in zip(corner, a, strict=True))
                            total = total + kernels[a][step] * u[_flip(behind, turned, grid)]
                        v[place] = total
                outputs.append(torch.stack([cut[place][0] * v[place] for place in places]))
        if mixer.directions == "4dir":
            weight, bias = mixer.copies.weight[0], mixer.copies.bias
            mixed = sum(w * y for w, y in zip(weight, outputs, strict=True)) + bias
        elif mixer.directions == "4dirp":
            mixed = mixer.copies(torch.stack(outputs, -1).flatten(1))
        else:
            mixed = torch.cat(outputs, -1)
        out.append(mixer.out_proj(mixed) * real[:, None])
    return torch.stack(out)


def _build(**options):
    torch.manual_seed(2)
    mixer = build("hyena", C, 1, **{"max_side": L, "filter_width": 4, "emb_dim": 5, "scale": "none", **options})
    return mixer


CASES = [
    {},
    {"scale": "official"},
    {"order": 3},
    {"filter_kind": "full"},
    {"filter_kind": "full", "window": "symmetric", "order": 3},
    {"filter_kind": "full", "window": "learn", "sqrt_window": True},
    {"window": "learn"},
    {"window": "none", "learn_positions": False, "num_inner": 0},
    {"directions": "4dir"},
    {"directions": "4dirp"},
    {"directions": "seq", "order": 3},
    {"directions": "parallel"},
    {"causal": True},
    {"causal": True, "directions": "parallel", "order": 3},
]


@pytest.mark.tier("T2", "mixer:hyena")
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("rank", [1, 2])
def test_hyena(rank, options) -> None:
    mixer, grid = _build(rank=rank, **options), {1: (5,), 2: (2, 3)}[rank]
    assert_defined_by(mixer, lambda x: _definition(mixer, x, grid), tokens(math.prod(grid), C), grid=grid)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"directions": "4dir"}], ids=str)
def test_masked_tokens(options) -> None:
    mixer = _build(**options)
    mask = torch.tensor([[True, False, True, True, False, False], [False, False, True, True, True, True]])
    x = tokens(6, C)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, (2, 3), mask), x, mask=mask, grid=(2, 3))


def test_volumes() -> None:
    mixer, grid = _build(rank=3), (2, 2, 2)
    assert mixer.supports.grid == {1, 2, 3}
    assert_defined_by(mixer, lambda x: _definition(mixer, x, grid), tokens(8, C), grid=grid)


def test_a_sequence_is_a_grid_of_height_one() -> None:
    mixer = _build()
    assert_defined_by(mixer, lambda x: _definition(mixer, x, (1, 5)), tokens(5, C))


@pytest.mark.parametrize("directions", ["standard", "parallel"])
def test_streaming_of_every_order(directions) -> None:
    mixer = _build(causal=True, order=3, directions=directions, max_side=32)
    x = tokens(20, C).detach()
    state, pieces = mixer.init_state(2), []
    for piece in x.split([1, 1, 7, 3, 8], dim=1):
        y, state = mixer.extend(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x))
    assert state["past"].shape == (2, 2 * C * (4 if directions == "parallel" else 1), 20)


@pytest.mark.parametrize(
    "options", [{"rank": 1}, {"rank": 3}, {"directions": "4dir"}, {"directions": "4dirp"}, {"directions": "seq", "order": 3},
                {"directions": "parallel"}], ids=str,
)  # fmt: skip
def test_the_contract_in_other_forms(options) -> None:
    flipped = options.get("directions") in ("4dir", "4dirp", "seq")
    report = attnlab.check("hyena", options={**options, "filter_width": 4, **({"causal": False} if flipped else {})},
                           only=["padding*", "caus*", "streaming*", "mixing*", "batch*", "grid*"])  # fmt: skip
    assert report.passed, str(report)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_corners_and_back(rank) -> None:
    flips = corners(rank)
    assert len(set(flips)) == 2**rank
    x = torch.randn(2, 3, *range(2, 2 + rank))
    copies = to_one_corner(from_corners(x, flips), flips)
    assert all(torch.equal(copy, x) for copy in copies)


def test_a_product_filter_has_rank_one_and_a_full_one_has_not() -> None:
    for kind, expected in (("product", 1), ("full", L)):
        mixer = _build(filter_kind=kind, window="none")
        assert int(torch.linalg.matrix_rank(mixer.filter((L, L))[0], rtol=1e-10)) == expected


def test_filters_do_not_depend_on_the_grid() -> None:
    own = _build(rank=2).filter
    torch.testing.assert_close(own((2, 3)), own((5, 6))[:, :2, :3])


def test_windows_and_positions_begin_as_the_authors() -> None:
    own = create_mixer("hyena", 4, max_side=8, emb_dim=5).filter
    expected = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, 4)
    torch.testing.assert_close(own.windows[0].rates[0], expected)
    for a in range(8):
        w = 2 * math.pi * a / 8
        row = [a / 7, math.cos(1e-4 * w), math.cos(w), -math.sin(1e-4 * w), -math.sin(w)]
        torch.testing.assert_close(own.z[a].detach(), torch.tensor(row))
    assert own.networks[0].frequency is own.networks[1].frequency


def test_every_channel_of_every_copy_is_a_head_of_the_matrix() -> None:
    mixer, x = _build(directions="4dir"), tokens(6, C).detach()
    with record(mixer) as tape:
        mixer(x, grid=(2, 3))
    matrix = mixer.mixing_matrix(x, grid=(2, 3))
    assert matrix.shape == (2, 4 * C, 6, 6)
    torch.testing.assert_close(matrix @ tape["values"], tape["mixed"])


def test_sides_above_the_largest() -> None:
    with pytest.raises(ValueError, match="max_side=6"):
        _build()(tokens(14, C), grid=(2, 7))
    mixer = _build(causal=True)
    state = mixer.extend(tokens(5, C), mixer.init_state(2))[1]
    with pytest.raises(ValueError, match="max_side=6"):
        mixer.extend(tokens(2, C), state)
    with pytest.raises(UnsupportedError, match="rank"):
        _build(rank=1)(tokens(6, C), grid=(2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 1}, "order"),
        ({"rank": 4}, "rank"),
        ({"directions": "8dir"}, "directions"),
        ({"directions": "4dir", "causal": True}, "directions"),
        ({"max_side": 0}, "max_side"),
        ({"filter_kind": "mlp"}, "filter_kind"),
        ({"window": "hann"}, "window"),
        ({"window": "symmetric"}, "product"),
        ({"emb_dim": 4}, "emb_dim"),
        ({"filter_width": 0}, "filter_width"),
        ({"num_inner": -1}, "num_inner"),
        ({"scale": "half"}, "scale"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("hyena", C, **options)
