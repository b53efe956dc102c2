"""ISTA-Net's token attention by its definition, its windows, and the shuffling of entities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer
from attnlab.mixers.parts.strided_windows import strided_windows
from attnlab.training.entity_permutation import permute_entities
from mixers.definition import assert_defined_by, build, tokens

U, P, C = 4, 3, 4


def _norm(y: list[Tensor], real: list[tuple[int, int]], norm, training: bool) -> dict[tuple[int, int], Tensor]:
    """BatchNorm over all positions of the real tokens; ``y`` is (P, C) a token."""
    if training:
        rows = torch.cat([y[b][u] for b, u in real])
        mean, variance = rows.mean(0), rows.var(0, correction=0)
    else:
        mean, variance = norm.running_mean, norm.running_var
    return {(b, u): (y[b][u] - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias for b, u in real}


def _definition(mixer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    maps, d, out = mixer.num_heads, mixer.qk_dim, []
    kernel, bias = mixer.out_proj.conv.weight, mixer.out_proj.conv.bias
    everything = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    real = [(b, u) for b in range(len(x)) for u in range(U) if everything[b, u]]
    for b in range(len(x)):
        cells, here = x[b].view(U, P, C), [u for u in range(U) if everything[b, u]]
        wave = [[(math.cos if c % 2 else math.sin)(u * 10000 ** (-(c - c % 2) / C)) for c in range(C)] for u in range(U)]
        placed = cells + torch.tensor(wave, dtype=x.dtype)[:, None]
        q, k = (f(placed).view(U, P, maps, d) for f in (mixer.q_proj, mixer.k_proj))
        mixed = [torch.zeros(P, maps * C, dtype=x.dtype) for _ in range(U)]
        for i in here:
            parts = []
            for h in range(maps):
                total = torch.zeros(P, C, dtype=x.dtype)
                for j in here:
                    score = sum((q[i, p, h] * k[j, p, h]).sum() for p in range(P)) / (d * P)
                    total = total + (mixer.alpha[h, 0, 0] * torch.tanh(score) + mixer.token_map[h, i, j]) * cells[j]
                parts.append(total)
            mixed[i] = torch.cat(parts, -1)
        rows, half = [], kernel.shape[2] // 2
        for i in range(U):
            taps = [(t, i + t - half) for t in range(kernel.shape[2]) if 0 <= i + t - half < U]
            rows.append(sum(mixed[j] @ kernel[:, :, t].T for t, j in taps) + bias)
        out.append(rows)
    normed = _norm(out, real, mixer.out_proj.norm, mixer.training)
    zero = torch.zeros(P, C, dtype=x.dtype)
    return torch.stack([torch.cat([normed.get((b, u), zero).flatten()[None] for u in range(U)]) for b in range(len(x))])


@pytest.mark.tier("T2", "mixer:tanh_map")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{"kernel_size": 3, "qk_dim": 2}, {"kernel_size": 5, "num_maps": 5}, {"kernel_size": 1}])
def test_tanh_map(options, training, masked) -> None:
    mixer = build("tanh_map", P * C, 3, num_tokens=U, inner=P, **options).train(training)
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]]) if masked else None

    def definition(x: Tensor) -> Tensor:
        return _definition(mixer, x if mask is None else x * mask[..., None], mask)

    assert_defined_by(mixer, definition, tokens(U, P * C), mask=mask)


def test_a_fresh_map_averages_and_has_both_signs() -> None:
    mixer = create_mixer("tanh_map", 8, 2, num_tokens=5)
    assert (mixer.token_map == 1 / 5).all() and (mixer.alpha == 1).all()
    with torch.no_grad():
        mixer.alpha.zero_()
        matrix = mixer.mixing_matrix(torch.randn(1, 5, 8))
    torch.testing.assert_close(matrix, torch.full((1, 2, 5, 5), 1 / 5))


@pytest.mark.parametrize("strided", [True, False])
def test_windows_by_hand(strided) -> None:
    x, (wt, wj, we) = torch.randn(2, 3, 7, 5, 2), (2, 3, 2)
    windows = strided_windows(x, (wt, wj, we), strided=strided)
    assert windows.shape == (2, 3, 2, 6, 4 * 2 * 1)
    for ut in range(4):
        for uj in range(2):
            for a in range(wt):
                for b in range(wj):
                    for c in range(we):
                        t, j = (ut + a * 4, uj + b * 2) if strided else (ut * wt + a, uj * wj + b)
                        expected = x[:, :, min(t, 6), min(j, 4), c]
                        assert torch.equal(windows[:, :, a, b * we + c, ut * 2 + uj], expected)


def test_entities_are_shuffled_whole_and_repeatably() -> None:
    x = torch.arange(2 * 3 * 4.0).view(2, 3, 4).repeat(16, 1, 1)
    one, same = (permute_entities(x, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, same) and not torch.equal(one, x)
    assert torch.equal(one.sort(dim=-1).values, x)  # rows rise in x: the entries of each are there once
    order = one[:, 0] - one[:, 0].amin(dim=1, keepdim=True)
    for row in (1, 2):  # all rows of an example in one order
        assert torch.equal(one[:, row] - one[:, row].amin(dim=1, keepdim=True), order)
    assert len({tuple(o) for o in order.tolist()}) > 4
    assert torch.equal(permute_entities(x, dim=1).sort(dim=1).values, x)


def test_bad_options() -> None:
    for options, message in (
        ({"num_tokens": 0}, "num_tokens: expected a positive integer, got 0"),
        ({"num_tokens": 4, "inner": 3}, "inner: expected a divisor of dim=8, got 3"),
        ({"num_tokens": 4, "num_maps": 0}, "num_maps: expected a positive integer, got 0"),
        ({"num_tokens": 4, "kernel_size": 4}, "kernel_size: expected an odd number, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            create_mixer("tanh_map", 8, 2, **options)
    with pytest.raises(ValueError, match="window: expected three positive sides"):
        strided_windows(torch.zeros(1, 1, 2, 2, 2), (2, 2))
    with pytest.raises(ValueError, match="dim: expected an axis of 3 other than the first, got 0"):
        permute_entities(torch.zeros(2, 3, 4), dim=0)
