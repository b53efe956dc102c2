"""Linear attention's slots by their definitions, pair by pair: feature maps, normalisers, rotation, random features."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnlab
from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens

DIM, HEADS = 8, 2
D = DIM // HEADS
LAWS = [
    "padding_inside",
    "empty*",
    "causality_gradient",
    "streaming_splits",
    "streaming_padding",
    "combined*",
    "dynamics*",
    "mixing*",
]
MASK = torch.tensor([[False, True, True, False, True, True], [True, False, True, True, True, False]])


def _features(mixer, x: Tensor) -> Tensor:
    name = mixer.feature_map
    if name in ("positive", "trigonometric"):
        x, w = x * D**-0.25, mixer.random.directions
        angles = [(direction * x).sum() for direction in w]
        if name == "positive":
            found = [torch.exp(a - (x * x).sum() / 2) for a in angles]
        else:
            found = [torch.exp((x * x).sum() / 2) * f(a) for f in (torch.sin, torch.cos) for a in angles]
        return torch.stack(found) / math.sqrt(len(w))
    if name == "softmax":
        return torch.exp(x) / torch.exp(x).sum()
    maps = {
        "elu": lambda t: t + 1 if t > 0 else torch.exp(t),
        "relu": lambda t: t.clamp(min=0),
        "squared_relu": lambda t: t.clamp(min=0) ** 2,
        "softplus": lambda t: torch.log(1 + torch.exp(t)),
        "sigmoid": lambda t: 1 / (1 + torch.exp(-t)),
        "exp": torch.exp,
        "leaky_relu": lambda t: t if t > 0 else 0.01 * t,
        "identity": lambda t: t,
    }
    return torch.stack([maps[name](t) for t in x])


def _turned(x: Tensor, place: int) -> Tensor:
    """Two pairs of channels, (0, 2) and (1, 3)."""
    angles = [place * 10000.0 ** (-pair / 2) for pair in range(2)]
    first = [x[p] * math.cos(a) - x[p + 2] * math.sin(a) for p, a in enumerate(angles)]
    return torch.stack(first + [x[p + 2] * math.cos(a) + x[p] * math.sin(a) for p, a in enumerate(angles)])


def _weights(kind: str, plain: Tensor, turned: Tensor, minimum: float) -> Tensor:
    """The weights of one query from its products with the keys."""
    c, s, scale = len(plain), plain.sum(), D**-0.5
    if kind == "divide":
        return turned / s if s != 0 else 0 * turned
    if kind == "clamp":
        return turned / max(s, torch.tensor(minimum, dtype=s.dtype))
    if kind == "subtract":
        return scale / c * turned + (1 - scale * s / c) / c
    if kind == "magnitude":
        z = scale * s / c
        return scale / c * turned * (1 + 1 / (z + 1e-6)) - z / c
    return turned


def definition(mixer, x: Tensor, kind: str = "divide", rotary: bool = False, real: Tensor | None = None, minimum: float = 1.0):
    out = []
    for b, example in enumerate(x):
        q, k, v = (layer(example).view(-1, HEADS, D) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        rows = []
        for i in range(len(example)):
            seen = [j for j in range(i + 1 if mixer.causal else len(example)) if real is None or real[b, j]]
            heads = []
            for h in range(HEADS):
                a, keys = _features(mixer, q[i, h]), {j: _features(mixer, k[j, h]) for j in seen}
                if not seen:
                    heads.append(torch.zeros(D, dtype=x.dtype))
                    continue
                plain = torch.stack([(a * key).sum() for key in keys.values()])
                turned = plain
                if rotary:
                    turned = torch.stack([(_turned(a, i) * _turned(key, j)).sum() for j, key in keys.items()])
                weights = _weights(kind, plain, turned, minimum)
                heads.append(sum(w * v[j, h] for w, j in zip(weights, seen, strict=True)))
            rows.append(mixer.out_proj(torch.cat(heads)))
        out.append(torch.stack(rows))
    y = torch.stack(out)
    return y if real is None else y * real[..., None]


@pytest.mark.tier("T2", "mixer:linear")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", ["squared_relu", "softplus", "sigmoid", "softmax", "positive", "trigonometric"])
def test_feature_maps(causal, feature_map) -> None:
    torch.manual_seed(3)
    mixer = build("linear", DIM, HEADS, causal=causal, feature_map=feature_map, num_features=5)
    assert_defined_by(mixer, lambda x: definition(mixer, x), tokens(5, DIM))


@pytest.mark.tier("T2", "mixer:linear")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("normalizer", ["divide", "clamp", "subtract", "magnitude", "none"])
def test_normalizers(causal, rotary, normalizer) -> None:
    mixer = build("linear", DIM, HEADS, causal=causal, normalizer=normalizer, rotary=rotary, denominator_min=12)
    if rotary:  # in float32 the frequencies carry a rounding that is theirs and ours
        mixer.rotary.frequencies = torch.tensor([1.0, 0.01], dtype=torch.float64)
    assert_defined_by(mixer, lambda x: definition(mixer, x, normalizer, rotary, minimum=12.0), tokens(6, DIM))
    assert_defined_by(
        mixer,
        lambda x: definition(mixer, x * MASK[..., None], normalizer, rotary, MASK, 12.0),
        tokens(6, DIM),
        mask=MASK,
    )


@pytest.mark.parametrize("feature_map", ["leaky_relu", "identity"])
def test_signed_features_without_a_quotient(feature_map) -> None:
    mixer = build("linear", DIM, HEADS, causal=True, feature_map=feature_map, normalizer="subtract")
    assert_defined_by(mixer, lambda x: definition(mixer, x, "subtract"), tokens(5, DIM))


@pytest.mark.parametrize(
    "options",
    [
        {"normalizer": "magnitude", "rotary": True},
        {"normalizer": "subtract", "feature_map": "identity"},
        {"feature_map": "positive", "num_features": 6},
    ],
    ids=str,
)
def test_the_contract_with_slots(options) -> None:
    report = attnlab.check("linear", options=options, only=LAWS)
    assert report.passed, str(report)


@pytest.mark.parametrize("normalizer", ["divide", "subtract", "magnitude"])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_sum_to_one(normalizer, causal) -> None:
    mixer = build("linear", DIM, HEADS, normalizer=normalizer, causal=causal)
    sums = mixer.mixing_matrix(tokens(7, DIM)).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


def test_only_a_quotient_confuses_queries_of_one_direction() -> None:
    x = tokens(7, DIM).detach()
    x[:, 1] = 2 * x[:, 0]
    apart = {}
    for normalizer in ("divide", "subtract", "magnitude"):
        mixer = build("linear", DIM, HEADS, normalizer=normalizer, feature_map="relu")
        rows = mixer.mixing_matrix(x)[:, :, :2]
        apart[normalizer] = float((rows[:, :, 0] - rows[:, :, 1]).detach().abs().max())
    assert apart["divide"] < 1e-12
    assert min(apart["subtract"], apart["magnitude"]) > 1e-3


def test_longer_queries_are_sharper_by_magnitude() -> None:
    def ratio(normalizer: str, length: float) -> float:
        mixer = create_mixer("linear", 2, 1, normalizer=normalizer, feature_map="relu", dtype=torch.float64)
        with torch.no_grad():
            mixer.q_proj.weight.copy_(length * torch.eye(2))
            mixer.k_proj.weight.copy_(torch.eye(2))
        x = torch.tensor([[[1.0, 0.2], [0.6, 0.5]]], dtype=torch.float64)
        row = mixer.mixing_matrix(x)[0, 0, 0]
        return float((row[0] / row[1]).detach())

    assert ratio("divide", 2.0) == pytest.approx(ratio("divide", 1.0), rel=1e-12)
    assert ratio("magnitude", 1.0) < ratio("magnitude", 1.5) < ratio("magnitude", 2.0)


def test_positive_features_estimate_softmax_attention() -> None:
    softmax = build("softmax", DIM, HEADS)
    mixer = build("linear", DIM, HEADS, feature_map="positive", num_features=1 << 15)
    mixer.load_state_dict({**softmax.state_dict(), "random.directions": mixer.random.directions})
    x = 0.5 * tokens(9, DIM).detach()
    torch.testing.assert_close(mixer.mixing_matrix(x), softmax.mixing_matrix(x), rtol=0.05, atol=0.005)


def test_directions_come_from_a_generator_and_are_saved() -> None:
    one, two = (
        create_mixer("linear", DIM, HEADS, feature_map="positive", generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(one.random.directions, two.random.directions)
    assert one.random.directions.shape == (D, D)
    one.redraw(torch.Generator().manual_seed(6))
    assert not torch.equal(one.random.directions, two.random.directions)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.random.directions, two.random.directions)
    plain = create_mixer("linear", DIM, HEADS)
    plain.redraw()
    assert plain.random is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "tanh"}, r"feature_map: expected one of \[.*'positive'.*\], got 'tanh'"),
        ({"feature_map": "positive", "num_features": 0}, "num_features: expected at least 1"),
        ({"normalizer": "softmax"}, "normalizer: expected one of"),
        ({"normalizer": "clamp", "denominator_min": 0.0}, "minimum: expected a positive number"),
        ({"feature_map": "positive", "rotary": True}, "rotary: expected False"),
        ({"position": "rotary"}, "position: expected 'none'"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("linear", DIM, HEADS, **options)
