"""Grouped queries whose groups follow the norms of the key heads, by their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab import create_mixer, record
from attnlab.mixers.heads.allocation import heads_in_order, rounded_shares, settle_by_draws, settle_by_size
from attnlab.mixers.heads.grouping import to_grouped
from mixers.definition import assert_defined_by, build, split_heads, tokens

H, HK, DIM = 8, 4, 16


def _norms(mixer, x: Tensor, mask: Tensor | None = None) -> list[float]:
    """Sum over the batch of the root of the sum of squares, entry by entry over real tokens."""
    totals = [0.0] * mixer.num_kv_heads
    for g, keys in enumerate(split_heads(mixer.k_proj(x).detach(), mixer.num_kv_heads)):
        for b in range(x.shape[0]):
            real = [t for t in range(x.shape[1]) if mask is None or bool(mask[b, t])]
            totals[g] += math.sqrt(sum(float(keys[b, t].square().sum()) for t in real))
    return totals


def _key_driven(norms: list[float], heads: int) -> list[int]:
    low, high = min(norms), max(norms)
    ratios = [(m - low) / (high - low) for m in norms]
    sizes = [round(heads * r / sum(ratios)) for r in ratios]  # Python rounds half to even as well
    while sum(sizes) > heads:
        sizes[sizes.index(max(sizes))] -= 1
    while sum(sizes) < heads:
        sizes[sizes.index(min(sizes))] += 1
    return sizes


def _dynamic(weights: list[float], heads: int, draws: list[int]) -> list[int]:
    sizes = [round(heads * w / sum(weights)) for w in weights]
    draws = list(draws)
    while sum(sizes) != heads:
        one = draws.pop(0)
        if sum(sizes) < heads:
            sizes[one] += 1
        elif sizes[one] > 0:
            sizes[one] -= 1
    return sizes


def _attend(mixer, x: Tensor, sizes: list[int], mask: Tensor | None = None) -> list[Tensor]:
    """Each query head over the key head that it was dealt to, a token at a time."""
    owner = [g for g, size in enumerate(sizes) for _ in range(size)]
    qs = split_heads(mixer.q_proj(x), mixer.num_heads)
    ks, vs = (split_heads(p(x), mixer.num_kv_heads) for p in (mixer.k_proj, mixer.v_proj))
    outputs = []
    for h, q in enumerate(qs):
        k, v = ks[owner[h]], vs[owner[h]]
        rows = []
        for b in range(x.shape[0]):
            keys = [t for t in range(x.shape[1]) if mask is None or bool(mask[b, t])]
            for i in range(x.shape[1]):
                e = torch.stack([(q[b, i] * k[b, j]).sum() / math.sqrt(q.shape[-1]) for j in keys]).exp()
                rows.append(sum(w * v[b, j] for w, j in zip(e / e.sum(), keys, strict=True)))
        outputs.append(torch.stack(rows).view(*x.shape[:2], -1))
    return outputs


@pytest.mark.tier("T2", "mixer:key_driven_gqa")
@pytest.mark.parametrize("masked", [False, True])
def test_key_driven(masked) -> None:
    mixer = build("key_driven_gqa", DIM, H, qkv_bias=True, num_kv_heads=HK).eval()
    x = tokens(5, DIM)
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]]) if masked else None
    sizes = _key_driven(_norms(mixer, x if mask is None else x * mask[..., None], mask), H)
    assert sizes != [2, 2, 2, 2]

    def definition(x: Tensor) -> Tensor:
        y = mixer.out_proj(torch.cat(_attend(mixer, x if mask is None else x * mask[..., None], sizes, mask), -1))
        return y if mask is None else y * mask[..., None]

    assert_defined_by(mixer, definition, x, mask=mask)


@pytest.mark.tier("T2", "mixer:dynamic_gqa")
@pytest.mark.parametrize("kind", ["diff", "ema"])
def test_dynamic_in_evaluation(kind) -> None:
    mixer = build("dynamic_gqa", DIM, H, kind=kind, num_kv_heads=HK).eval()
    mixer.statistic.copy_(torch.tensor([9.0, 2.0, 14.0, 5.0]))
    mixer.tiebreak.copy_(torch.randint(HK, mixer.tiebreak.shape, generator=torch.Generator().manual_seed(4)))
    x = tokens(5, DIM)
    stored, norms = mixer.statistic.tolist(), _norms(mixer, x)
    pairs = list(zip(stored, norms, strict=True))
    weights = [abs(c - m) for c, m in pairs] if kind == "diff" else [0.9 * m + 0.1 * c for c, m in pairs]
    sizes = _dynamic(weights, H, mixer.tiebreak.tolist())
    assert_defined_by(mixer, lambda x: mixer.out_proj(torch.cat(_attend(mixer, x, sizes), -1)), x)
    assert mixer.statistic.tolist() == stored


def test_dynamic_over_training_steps() -> None:
    mixer = build("dynamic_gqa", DIM, H, window_size=2, num_kv_heads=HK, generator=torch.Generator().manual_seed(1))
    c, sizes = [0.0] * HK, None
    for step in range(5):
        x = tokens(4, DIM) * (1 + step)
        norms = _norms(mixer, x)
        with record(mixer, only=["key_heads"]) as tape:
            mixer(x)
            mixer(x)  # the same batch again, as checkpointing does: no second step
        if step % 2 == 0:
            sizes = _dynamic([abs(a - m) for a, m in zip(c, norms, strict=True)], H, mixer.tiebreak.tolist())
            c = [(a + m) / 2 for a, m in zip(c, norms, strict=True)]
        assert torch.bincount(tape["key_heads"], minlength=HK).tolist() == sizes
        torch.testing.assert_close(mixer.statistic, torch.tensor(c, dtype=torch.float64))
    assert int(mixer.step) == 5


@pytest.mark.tier("T2", "mixer:perturbed_gqa")
def test_perturbed() -> None:
    mixer = build("perturbed_gqa", DIM, 4, num_kv_heads=2)
    noise = torch.rand(4, 5, 4, dtype=torch.float64)
    mixer.hold(noise)
    mask = torch.tensor([[True, True, False, True, True], [True] * 5])

    def definition(x: Tensor) -> Tensor:
        x = x * mask[..., None]
        heads = []
        for h, out in enumerate(_attend(mixer, x, [2, 2], mask)):
            rows = []
            for b in range(2):
                o, u = out[b][mask[b]], noise[h][mask[b]]
                standard = (noise[h] - u.mean()) / u.std()
                rows.append(out[b] - (o.mean() + o.std() * standard))
            heads.append(torch.stack(rows))
        return mixer.out_proj(torch.cat(heads, -1)) * mask[..., None]

    assert_defined_by(mixer, definition, tokens(5, DIM), mask=mask)


def test_perturbed_draws_in_training_alone() -> None:
    mixer = build("perturbed_gqa", DIM, 4, num_kv_heads=2, generator=torch.Generator().manual_seed(3))
    x = tokens(5, DIM)
    drawn = mixer(x)
    assert (mixer.noise.flatten(1)[[0, 1, 2, 3], [0, 1, 0, 1]] == 0).all()
    mixer.hold(mixer.noise)
    assert torch.equal(mixer.eval()(x), drawn)
    mixer.hold(None)
    plain = create_mixer("softmax", DIM, 4, num_kv_heads=2).double()
    plain.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x), plain(x))


@pytest.mark.tier("T2", "mixer:ragged_gqa")
@pytest.mark.parametrize("sizes", [[3, 0, 4, 1], [2, 2, 2, 2]])
def test_ragged(sizes) -> None:
    mixer = build("ragged_gqa", DIM, H, num_kv_heads=HK, group_sizes=sizes)
    assert_defined_by(mixer, lambda x: mixer.out_proj(torch.cat(_attend(mixer, x, sizes), -1)), tokens(5, DIM))


def _with_equal_norms(mixer) -> None:
    """Key heads that differ in their signs alone, so that their norms are the same to the last bit."""
    first = mixer.k_proj.weight.detach().unflatten(0, (mixer.num_kv_heads, -1))[0]
    signs = torch.tensor([1.0, -1.0], dtype=first.dtype)[torch.randint(2, (mixer.num_kv_heads, len(first), 1))]
    with torch.no_grad():
        mixer.k_proj.weight.copy_((signs * first).flatten(0, 1))


@pytest.mark.parametrize("groups", [H, HK, 1])
def test_key_driven_with_equal_norms_is_plain(groups) -> None:
    """One head a group: multi-head attention. Pooled heads and equal groups: grouped-query attention."""
    multi = build("softmax", DIM, H)
    grouped = to_grouped(multi, groups)
    _with_equal_norms(grouped)
    for name in ("key_driven_gqa", "dynamic_gqa"):
        ours = create_mixer(name, DIM, H, num_kv_heads=groups).double().eval()
        ours.load_state_dict(grouped.state_dict(), strict=False)
        x = tokens(6, DIM)
        torch.testing.assert_close(ours(x), grouped(x), rtol=1e-12, atol=1e-12)


def test_ragged_takes_the_groups_that_were_found() -> None:
    driven = build("key_driven_gqa", DIM, H, num_kv_heads=HK).eval()
    x = tokens(6, DIM)
    with record(driven, only=["key_heads"]) as tape:
        y = driven(x)
    sizes = torch.bincount(tape["key_heads"], minlength=HK).tolist()
    fixed = create_mixer("ragged_gqa", DIM, H, num_kv_heads=HK, group_sizes=sizes).double()
    fixed.load_state_dict(driven.state_dict())
    assert torch.equal(fixed(x), y)


def test_settling_always_ends_at_the_total() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        groups, total = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(2))
        sizes = rounded_shares(torch.rand(groups, generator=generator) ** 4, total)
        draws = torch.randint(groups, (2,), generator=generator)
        for settled in (settle_by_size(sizes, total), settle_by_draws(sizes, total, draws)):
            assert int(settled.sum()) == total
            assert int(settled.min()) >= 0
            assert len(heads_in_order(settled, total)) == total


def test_to_grouped_pools_in_any_order() -> None:
    multi = build("softmax", DIM, 4, qkv_bias=True)
    with torch.no_grad():  # heads 0 and 2 have the same keys and values, and so have 1 and 3: pooling changes nothing
        for layer in (multi.k_proj, multi.v_proj):
            for tensor in (layer.weight, layer.bias):
                heads = tensor.unflatten(0, (4, -1))
                heads[2:] = heads[:2].clone()
    x = tokens(6, DIM)
    for grouping in ("similar_keys", [0, 1, 0, 1], [1, 0, 1, 0]):
        torch.testing.assert_close(to_grouped(multi, 2, grouping=grouping)(x), multi(x), rtol=1e-12, atol=1e-12)
    assert float((to_grouped(multi, 2)(x) - multi(x)).detach().abs().max()) > 1e-3
    with pytest.raises(ValueError, match="grouping"):
        to_grouped(multi, 2, grouping="nearest")
    with pytest.raises(ValueError, match="num_kv_heads"):
        to_grouped(multi, 3)


def test_to_grouped_keeps_norms_and_positions_and_loses_nothing() -> None:
    options = {"qk_norm": "layer_norm", "position": "rotary", "position_options": {"base": 100.0}, "causal": True}
    multi = build("softmax", DIM, 4, **options)
    x = tokens(6, DIM)
    torch.testing.assert_close(to_grouped(multi, 4)(x), multi(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="linear_router"):
        to_grouped(build("moh", DIM, 4), 2)
    with pytest.raises(ValueError, match="position"):
        to_grouped(build("softmax", DIM, 4, position="alibi"), 2, grouping=[0, 1, 0, 1])


def test_packed_sequences_have_moments_of_their_own() -> None:
    mixer = build("perturbed_gqa", DIM, 4, num_kv_heads=2)
    mixer.hold(torch.rand(4, 5, 4, dtype=torch.float64))
    x = tokens(5, DIM)
    packed = mixer.packed(x.flatten(0, 1), torch.tensor([0, 5, 10]))
    torch.testing.assert_close(packed.view_as(x), mixer(x), rtol=1e-12, atol=1e-12)
