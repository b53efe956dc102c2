"""Subsampled attention by its definition, its sampling laws, and its ensemble."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from attnlab import UnsupportedError, create_mixer, record
from attnlab.checking.cost import work
from attnlab.mixers.sparse.sampled_windows import is_dense_step, layer_sigma, sample_windows
from attnlab.mixers.sparse.subsampled import ensemble, subsampling
from mixers.definition import assert_defined_by, build, split_heads, tokens

WINDOWS = torch.tensor([[1, 4, 6, 8], [0, 2, 5, -1], [3, 7, -1, -1]])
MASK = torch.tensor([[True, False, True, True, True, False, True, False, True], [True] * 9])


def _definition(mixer, x: Tensor, windows: Tensor, mask: Tensor, bias) -> Tensor:
    x = x * mask[..., None]
    window = {t: row for row in windows.tolist() for t in row if t >= 0}
    heads = []
    for h, (q, k, v) in enumerate(zip(*(split_heads(p(x), 3) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)), strict=True)):
        out = torch.zeros_like(q)
        for b, t in itertools.product(range(x.shape[0]), range(x.shape[1])):
            keys = [s for s in window[t] if s >= 0 and mask[b, s] and (s <= t or not mixer.causal)]
            if keys:
                logits = torch.stack([q[b, t] @ k[b, s] / math.sqrt(4) + bias(h, s - t) for s in keys])
                out[b, t] = sum(w * v[b, s] for w, s in zip(logits.softmax(0), keys, strict=True))
        heads.append(out)
    return mixer.out_proj(torch.cat(heads, -1)) * mask[..., None]


@pytest.mark.tier("T2", "mixer:subsampled")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("position", ["none", "alibi"])
@pytest.mark.parametrize("masked", [False, True])
def test_in_given_windows(causal, position, masked) -> None:
    mixer = build("subsampled", 12, 3, causal=causal, position=position)
    mixer.hold(WINDOWS)
    slopes = [2**-4, 2**-8, 2**-2]  # ALiBi's of three heads

    def bias(h: int, offset: int) -> float:
        return 0.0 if position == "none" else -slopes[h] * abs(offset)

    mask = MASK if masked else torch.ones_like(MASK)
    assert_defined_by(mixer, lambda x: _definition(mixer, x, WINDOWS, mask, bias), tokens(9), mask=mask if masked else None)


@pytest.mark.parametrize("policy", ["unbiased", "local"])
@pytest.mark.parametrize(("causal", "position"), [(True, "rotary"), (False, "alibi")])
def test_one_window_is_dense_attention(policy, causal, position) -> None:
    ours = build("subsampled", 12, 3, reduction=1, policy=policy, causal=causal, position=position, num_kv_heads=1).train()
    dense = create_mixer("softmax", 12, 3, causal=causal, position=position, num_kv_heads=1).double()
    dense.load_state_dict(ours.state_dict())
    x, pairs = tokens(9), torch.rand(2, 3, 9, 9) < 0.7
    torch.testing.assert_close(ours(x, mask=MASK), dense(x, mask=MASK), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours(x, pair_mask=pairs), dense(x, pair_mask=pairs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("grid", "reduction", "sigma", "size"),
    [
        ((12,), 4, None, 3),
        ((12,), 4, 2.0, 3),
        ((11,), 4, 0.0, 3),
        ((4, 6), 4, 1.0, 6),
        ((4, 6), 4, None, 6),
        ((2, 4, 4), 8, 1.0, 4),
    ],
)
def test_every_token_is_in_one_window(grid, reduction, sigma, size) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        windows = sample_windows(grid, reduction=reduction, sigma=sigma, generator=generator)
        assert windows.shape[1] == size
        assert windows[windows >= 0].sort().values.tolist() == list(range(math.prod(grid)))
        if sigma is None and math.prod(grid) % size == 0:
            assert (windows >= 0).all()


def test_without_jitter_windows_are_shifted_blocks() -> None:
    generator, shifts = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        rows = [[t for t in row if t >= 0] for row in sample_windows((12,), reduction=4, sigma=0.0, generator=generator).tolist()]
        rows = [row for row in rows if row]
        assert all(row == list(range(row[0], row[0] + len(row))) for row in rows)
        shifts.add(len(rows[0]))
    assert shifts == {1, 2, 3}


def test_jitter_reaches_as_far_as_sigma_says() -> None:
    generator = torch.Generator().manual_seed(0)

    def reach(sigma: float | None) -> float:
        spread = []
        for _ in range(20):
            windows = sample_windows((256,), reduction=32, sigma=sigma, generator=generator)
            spread += [abs(a - b) for row in windows.tolist() for a in row for b in row if min(a, b) >= 0]
        return sum(spread) / len(spread)

    near, far, everywhere = reach(2.0), reach(1e5), reach(None)
    assert near < 8 / 2 + 2 * 2
    assert far == pytest.approx(everywhere, rel=0.05)


def test_unbiased_pairs_meet_equally_often() -> None:
    generator, met, draws = torch.Generator().manual_seed(0), Counter(), 1500
    for _ in range(draws):
        for row in sample_windows((8,), reduction=2, generator=generator).tolist():
            met.update(itertools.combinations(row, 2))
    expected = 3 / 7  # (w - 1) / (n - 1)
    deviation = math.sqrt(expected * (1 - expected) / draws)
    assert len(met) == 28
    assert all(abs(count / draws - expected) < 5 * deviation for count in met.values())


def test_draws_come_from_the_generator_and_can_be_held() -> None:
    x = tokens(9)
    mixer = build("subsampled", reduction=3, generator=torch.Generator().manual_seed(5)).train()
    with record(mixer, only=["windows"]) as tape:
        first, second = mixer(x), mixer(x)
    assert not torch.equal(first, second)
    mixer.generator = torch.Generator().manual_seed(5)
    assert torch.equal(mixer(x), first)
    mixer.eval().hold(tape["windows"])
    assert torch.equal(mixer(x), second)
    mixer.hold(None)
    with subsampling(mixer.train(), "never"):
        dense = mixer(x)
    assert torch.equal(mixer.eval()(x), dense)


def test_ensemble_converges_to_the_mean_of_all_sub_models() -> None:
    mixer = build("subsampled", 12, 3, reduction=2, generator=torch.Generator().manual_seed(1)).eval()
    x = tokens(4).detach()
    outputs = []
    for partition in ([[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 3], [1, 2]]):  # equally likely
        mixer.hold(torch.tensor(partition))
        outputs.append(mixer(x).detach())
    mixer.hold(None)
    draws, every = 150, torch.stack(outputs)
    with torch.no_grad():
        mean = ensemble(mixer, lambda: mixer(x), draws, probabilities=False)
        odds = ensemble(mixer, lambda: mixer(x), draws)
    assert ((mean - every.mean(0)).abs() < 5 * every.std(0, correction=0) / math.sqrt(draws) + 1e-12).all()
    odds_of_each = every.softmax(-1)
    assert ((odds - odds_of_each.mean(0)).abs() < 5 * odds_of_each.std(0, correction=0) / math.sqrt(draws) + 1e-12).all()
    assert mixer.when == "training"


def test_training_costs_a_fraction() -> None:
    mixer = create_mixer("subsampled", 16, 4, reduction=8)
    dense, sampled = (work(mixer.train(mode), 1, 2048, masked=False) for mode in (False, True))
    assert sampled < dense / 4


def test_schedules() -> None:
    assert [layer_sigma(1.5, layer) for layer in range(3)] == [1.5, 3.0, 6.0]
    assert [step for step in range(20) if is_dense_step(step, 20)] == [18, 19]


def test_bad_options_are_named() -> None:
    for name, options in (("reduction", {"reduction": 0.5}), ("policy", {"policy": "near"}), ("sigma", {"sigma": -1.0})):
        with pytest.raises(ValueError, match=name):
            create_mixer("subsampled", 12, 3, **options)
    mixer = build("subsampled", position="relative").train()
    with pytest.raises(UnsupportedError, match="position"):
        mixer(tokens(9))
    mixer = build("subsampled")
    for windows in ([[0, 1], [1, 2]], [[1, 0], [2, -1]]):
        with pytest.raises(ValueError, match="windows"):
            mixer.hold(torch.tensor(windows))
    mixer.hold(torch.tensor([[0, 2], [1, -1]]))
    with pytest.raises(ValueError, match="windows"):
        mixer(tokens(4))
