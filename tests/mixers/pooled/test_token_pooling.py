"""Token-aware average pooling by its definition, cell by cell, in front of several mixers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import UnsupportedError, check, create_mixer, record
from mixers.definition import assert_defined_by, build, tokens


def _pooled(mixer, x: Tensor, grid: tuple[int, int], mask: Tensor, training: bool) -> Tensor:
    b, n, dim = x.shape
    cells = [(e, i, j) for e in range(b) for i in range(grid[0]) for j in range(grid[1]) if mask[e, i * grid[1] + j]]
    token = {cell: x[cell[0], cell[1] * grid[1] + cell[2]] for cell in cells}

    def convolve(source: dict, kernel: Tensor) -> dict:
        found = {}
        for e, i, j in cells:
            total = torch.zeros(kernel.shape[0], dtype=x.dtype)
            for di in range(3):
                for dj in range(3):
                    if (place := (e, i + di - 1, j + dj - 1)) in source:
                        total = total + kernel[:, :, di, dj] @ source[place]
            found[e, i, j] = total
        return found

    norm, raw = mixer.score.norm, convolve(token, mixer.score.conv.weight)
    mean, variance = norm.running_mean, norm.running_var
    if training:
        mean = sum(raw.values()) / len(raw)
        variance = sum((row - mean) ** 2 for row in raw.values()) / len(raw)
    normal = {cell: (row - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias for cell, row in raw.items()}
    scores = convolve(normal, mixer.choose.weight)
    out = torch.zeros(b, n, dim, dtype=x.dtype)
    for e, i, j in cells:
        shares = torch.softmax(scores[e, i, j] / mixer.temperature, 0)
        total = shares[0] * token[e, i, j]
        for r in range(1, mixer.scales):
            around = [(e, i + di, j + dj) for di in (-r, 0, r) for dj in (-r, 0, r)]
            total = total + shares[r] * sum(token[place] for place in around if place in token) / 9
        out = out.index_put((torch.tensor(e), torch.tensor(i * grid[1] + j)), total)
    return out


@pytest.mark.tier("T2", "mixer:token_pooling")
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("masked", [False, True])
def test_token_pooling(masked, training) -> None:
    grid, mask = (3, 4), torch.ones(2, 12, dtype=torch.bool)
    if masked:
        mask[0, 9:] = mask[1, 5] = False
    mixer = build("token_pooling", 6, 2, scales=3, temperature=0.5).train(training)
    given = {"mask": mask} if masked else {}

    def definition(x: Tensor) -> Tensor:
        return mixer.mixer(_pooled(mixer, x, grid, mask, training), **given)

    assert_defined_by(mixer, definition, tokens(12, 6), grid=grid, **given)


@pytest.mark.tier("T2", "mixer:token_pooling")
def test_the_norm_is_between_pooling_and_mixer() -> None:
    mixer = build("token_pooling", 6, 2, scales=2, mixer="window", mixer_options={"window": 2}, pooled_norm=True).eval()
    everything = torch.ones(2, 6, dtype=torch.bool)

    def definition(x: Tensor) -> Tensor:
        pooled = _pooled(mixer, x, (2, 3), everything, False)
        return mixer.mixer(F.layer_norm(pooled, (6,), mixer.norm.weight, mixer.norm.bias), grid=(2, 3))

    assert_defined_by(mixer, definition, tokens(6, 6), grid=(2, 3))


@pytest.mark.parametrize(("name", "options"), [("pooling", {}), ("window", {"window": 3}), ("agent", {"num_agents": 4})])
def test_it_supports_what_the_mixer_does(name, options) -> None:
    report = check("token_pooling", options={"mixer": name, "mixer_options": options, "scales": 2})
    assert report.passed, str(report)
    wrapped = create_mixer("token_pooling", 8, 2, mixer=name, mixer_options=options)
    assert wrapped.supports.cost == wrapped.mixer.supports.cost
    assert wrapped.supports.mixing_matrix == wrapped.mixer.supports.mixing_matrix


def test_what_is_recorded() -> None:
    mixer = create_mixer("token_pooling", 8, 2)
    with record(mixer) as tape:
        mixer(torch.randn(2, 6, 8), grid=(2, 3))
    torch.testing.assert_close(tape["scales"].sum(-1), torch.ones(2, 6))
    assert tape["mixer/attention"].shape == (2, 2, 6, 6)
    assert tape["mixed"] is tape["mixer/mixed"]
    assert set(tape.items) == {"scales", "pooled", "values", "mixed", "mixer/values", "mixer/mixed", "mixer/attention"}


def test_even_tokens_stay_even_inside() -> None:
    mixer = build("token_pooling", 4, 1, scales=3).eval()
    with record(mixer, only=["pooled"]) as tape:
        mixer(torch.ones(1, 81, 4, dtype=torch.float64), grid=(9, 9))
    inside = tape["pooled"].unflatten(1, (9, 9))[:, 2:-2, 2:-2]
    torch.testing.assert_close(inside, torch.ones_like(inside))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": 0}, "scales"),
        ({"temperature": 0.0}, "temperature"),
        ({"mixer": "sliding_window"}, "rank 2"),
        ({"mixer": "softmaxx"}, "did you mean 'softmax'"),
        ({"mixer": "agent", "mixer_options": {"class_token": True}}, "tokens in front"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("token_pooling", 12, 3, **options)


def test_an_always_causal_mixer_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="causal=False"):
        create_mixer("token_pooling", 12, 3, mixer="mamba")
