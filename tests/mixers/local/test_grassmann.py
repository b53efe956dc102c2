"""Grassmann flows by their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from mixers.definition import assert_defined_by, build, tokens


def _definition(mixer, h: Tensor, real: list[list[bool]] | None = None) -> Tensor:
    """Pair by pair of tokens, coordinate by coordinate; rows of masked tokens are left 0."""
    out, r = [], mixer.reduced_dim
    for b in range(h.shape[0]):
        z, rows = h[b] @ mixer.reduce.weight.mT + mixer.reduce.bias, []
        for t in range(h.shape[1]):
            if real is not None and not real[b][t]:
                rows.append(torch.zeros_like(h[b, t]))
                continue
            found = []
            for offset in mixer.offsets:
                s = t - offset
                if s < 0 or (real is not None and not real[b][s]):
                    continue
                p = torch.stack([z[t, i] * z[s, j] - z[t, j] * z[s, i] for i in range(r) for j in range(i + 1, r)])
                found.append(mixer.encode.weight @ (p / p.norm().clamp(min=1e-8)) + mixer.encode.bias)
            g = sum(found) / len(found) if found else torch.zeros_like(h[b, t])
            a = torch.sigmoid(mixer.gate.weight @ torch.cat((h[b, t], g)) + mixer.gate.bias)
            u = a * h[b, t] + (1 - a) * g
            u = (u - u.mean()) / (u.var(unbiased=False) + 1e-5).sqrt()
            rows.append(mixer.norm.weight * u + mixer.norm.bias)
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.tier("T2", "mixer:grassmann")
@pytest.mark.parametrize("offsets", [(1, 2, 4), (3,), (1, 1, 20)])
def test_grassmann(offsets) -> None:
    mixer = build("grassmann", 6, 1, reduced_dim=3, offsets=offsets)
    assert_defined_by(mixer, lambda h: _definition(mixer, h), tokens(8, 6))


@pytest.mark.tier("T2", "mixer:grassmann")
def test_offsets_count_places_and_pairs_need_two_real_tokens() -> None:
    mixer = build("grassmann", 6, 1, reduced_dim=3, offsets=(1, 2))
    real = [[False, True, True, False, True, True, True], [True, False, False, True, True, True, False]]
    assert_defined_by(mixer, lambda h: _definition(mixer, h, real), tokens(7, 6), mask=torch.tensor(real))


def test_equal_tokens_span_no_plane() -> None:
    mixer = create_mixer("grassmann", 8, reduced_dim=4, offsets=(1,))
    x = torch.randn(1, 1, 8).expand(1, 5, 8).clone().requires_grad_()
    y = mixer(x)
    with torch.no_grad():
        g = mixer.encode.bias.expand(4, 8)
        a = torch.sigmoid(mixer.gate(torch.cat((x[0, 1:], g), -1)))
        torch.testing.assert_close(y[0, 1:], mixer.norm(a * x[0, 1:] + (1 - a) * g))
    y.square().sum().backward()
    assert bool(x.grad.isfinite().all())


def test_a_token_of_zeros_gives_finite_gradients() -> None:
    mixer = create_mixer("grassmann", 8, reduced_dim=4, offsets=(1, 2))
    torch.nn.init.zeros_(mixer.reduce.bias)
    x = torch.randn(1, 5, 8)
    x[:, 2] = 0.0
    x.requires_grad_()
    mixer(x).square().sum().backward()
    assert bool(x.grad.isfinite().all())


def test_an_open_gate_passes_the_token() -> None:
    mixer = create_mixer("grassmann", 8, reduced_dim=4)
    torch.nn.init.constant_(mixer.gate.bias, 1e3)
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(mixer(x), mixer.norm(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reduced_dim": 1}, "reduced_dim"), ({"offsets": ()}, "offsets"), ({"offsets": (0, 1)}, "offsets")],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("grassmann", 12, **options)
