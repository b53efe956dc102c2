"""HyperAttention against its algorithm written out query by query, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer
from attnlab.core.errors import UnsupportedError
from mixers.definition import assert_defined_by, build, split_heads, tokens


def bucket(x: Tensor, directions: Tensor) -> int:
    """The rank of the sign pattern in Gray's order, by the recursion over its bits."""
    table = [0, 1]
    for r in range(2, directions.shape[1] + 1):
        table = table + [rank + 2 ** (r - 1) for rank in reversed(table)]
    return table[sum(2**i for i in range(directions.shape[1]) if float(x.detach() @ directions[:, i]) > 0)]


def pairs_of(mixer, queries, keys, hashes, h, start):
    """The keys of each query's block, its samples, and the factor of these; places of a sequence throughout."""
    b = mixer.block
    in_order = sorted(keys, key=lambda j: (hashes[1][j], j))
    blocks = [in_order[i : i + b] for i in range(0, len(in_order), b)]
    by_rank = sorted(queries, key=lambda i: (hashes[0][i], i))
    found = {}
    for rank, i in enumerate(by_rank):
        if not blocks:
            found[i] = ([], [], 1.0, 0)
            continue
        if mixer.causal:
            left = sum(hashes[1][j] < hashes[0][i] for j in keys)
            right = sum(hashes[1][j] <= hashes[0][i] for j in keys)
            own = min((left + right) // 2 // b, len(blocks) - 1)
        else:
            padded = math.ceil(len(queries) / b) * b
            own = min(rank // math.ceil(padded / len(blocks)), len(blocks) - 1)
        samples = []
        for u in mixer.samples[h].tolist():
            place = (u + start * 1327217885) % 2**31 * len(keys) // 2**31
            if not (mixer.mask_own_block and place // b == own):
                samples.append(in_order[place])
        if len(keys) <= b:
            samples = []
        missing = b - len(blocks[own]) if mixer.border == "zero_keys" else 0
        found[i] = (blocks[own], samples, len(keys) / max(mixer.num_samples, 1), missing)
    return found


def definition(mixer, mask=None):
    def attend(x: Tensor) -> Tensor:
        n, heads = x.shape[1], mixer.num_heads
        q = split_heads(mixer.q_proj(x), heads)
        k, v = (split_heads(p(x), mixer.num_kv_heads) for p in (mixer.k_proj, mixer.v_proj))
        ordered = mixer.causal or mixer.hide_later
        out = []
        for b in range(len(x)):
            real = [i for i in range(n) if mask is None or mask[b, i]]
            columns = []
            for h in range(heads):
                kv = h // (heads // mixer.num_kv_heads)
                hashes = [{i: bucket(t[b, i], mixer.hash.directions) for i in real} for t in (q[h], k[kv])]
                lists: dict[int, list] = {i: [] for i in real}
                if ordered:
                    for i in real:
                        leaf = i // mixer.min_exact
                        lists[i].append(([j for j in real if j // mixer.min_exact == leaf and j <= i], [], 1.0, 0))
                    size = mixer.min_exact
                    while size < n:
                        for start in range(0, n - size, 2 * size):
                            early = [j for j in real if start <= j < start + size]
                            late = [i for i in real if start + size <= i < start + 2 * size]
                            for i, found in pairs_of(mixer, late, early, hashes, h, start + size).items():
                                lists[i].append(found)
                        size *= 2
                elif len(real) < mixer.min_exact:
                    lists = {i: [(real, [], 1.0, 0)] for i in real}
                else:
                    lists = {i: [found] for i, found in pairs_of(mixer, real, real, hashes, h, 0).items()}
                rows = []
                for i in range(n):
                    total, weighed = torch.zeros((), dtype=x.dtype), torch.zeros_like(v[kv][b, i])
                    for block, samples, factor, missing in lists.get(i, []):
                        total = total + missing
                        for j, weight in [(j, 1.0) for j in block] + [(j, factor) for j in samples]:
                            e = weight * (q[h][b, i] @ k[kv][b, j] / math.sqrt(q[h].shape[-1])).exp()
                            total, weighed = total + e, weighed + e * v[kv][b, j]
                    rows.append(weighed / total if i in lists else weighed)
                columns.append(torch.stack(rows))
            out.append(torch.cat(columns, dim=-1))
        y = mixer.out_proj(torch.stack(out))
        return y if mask is None else y * mask.unsqueeze(-1)

    return attend


def weights(mixer) -> dict[str, Tensor]:
    """What a mixer has in common with dense attention."""
    return {name: value for name, value in mixer.state_dict().items() if name not in ("samples", "hash.directions")}


SMALL = {"block": 3, "num_samples": 4, "min_exact": 4, "num_projections": 3}


@pytest.mark.tier("T2", "mixer:hyper_attention")
@pytest.mark.parametrize("order", [{}, {"causal": True}, {"hide_later": True}], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"mask_own_block": True, "num_kv_heads": 1}, {"num_samples": 0}, {"border": "zero_keys"}], ids=str
)
def test_equals_its_definition(options, order) -> None:
    mixer = build("hyper_attention", 12, 3, **(SMALL | options | order))
    assert_defined_by(mixer, definition(mixer), tokens(19, 12))


@pytest.mark.tier("T2", "mixer:hyper_attention")
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_sizes_and_masks(data) -> None:
    n, seed = data.draw(st.integers(1, 23)), data.draw(st.integers(0, 99))
    order = data.draw(st.sampled_from([{}, {"causal": True}]))
    sizes = {name: data.draw(st.integers(least, 5)) for name, least in (("block", 1), ("num_samples", 0), ("min_exact", 1))}
    mixer = build("hyper_attention", 4, 2, num_projections=2, mask_own_block=data.draw(st.booleans()), **sizes, **order)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, n, generator=generator) < data.draw(st.sampled_from([0.3, 0.8]))
    x = torch.randn(2, n, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, mask=mask), definition(mixer, mask)(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("causal", "sizes"), [(False, {"block": 40, "min_exact": 1}), (False, {}), (True, {})], ids=str)
def test_one_block_and_short_sequences_are_dense_attention(causal, sizes) -> None:
    mixer, dense = build("hyper_attention", causal=causal, **sizes), build("softmax", causal=causal)
    dense.load_state_dict(
        {name: value for name, value in mixer.state_dict().items() if name not in ("samples", "hash.directions")}
    )
    x = tokens(17)
    torch.testing.assert_close(mixer(x), dense(x))


def test_halves_with_one_block_are_dense_attention() -> None:
    """Whatever the halves: if a block holds all of each there is no sampling."""
    mixer, dense = build("hyper_attention", causal=True, block=64, min_exact=3), build("softmax", causal=True)
    dense.load_state_dict(
        {name: value for name, value in mixer.state_dict().items() if name not in ("samples", "hash.directions")}
    )
    x = tokens(37)
    torch.testing.assert_close(mixer(x), dense(x))


def test_the_published_choice_looks_ahead_and_the_causal_one_does_not() -> None:
    torch.manual_seed(0)
    looks, causal = (build("hyper_attention", **SMALL, **order) for order in ({"hide_later": True}, {"causal": True}))
    x = tokens(32).detach()
    other = x.clone()
    other[:, 26:] = torch.randn(2, 6, 12, dtype=torch.float64)
    torch.testing.assert_close(causal(x)[:, :26], causal(other)[:, :26])
    assert float((looks(x) - looks(other))[:, :26].detach().abs().max()) > 1e-3


def test_more_samples_come_closer() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 256, 16, generator=generator)
    errors = []
    for number in (4, 64, 1024):
        torch.manual_seed(1)
        mixer = create_mixer("hyper_attention", 16, 2, block=16, num_samples=number, min_exact=1, mask_own_block=True)
        dense = create_mixer("softmax", 16, 2)
        dense.load_state_dict(weights(mixer))
        errors.append(float((mixer(x) - dense(x)).detach().norm() / dense(x).detach().norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_a_context_of_another_length() -> None:
    mixer = build("hyper_attention", **SMALL)
    x, context = tokens(13).detach(), tokens(22).detach()
    matrix = mixer.mixing_matrix(x, context)
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    mask = torch.arange(22).expand(2, -1) < 17
    torch.testing.assert_close(mixer(x, context, context_mask=mask), mixer(x, context[:, :17]))


def test_draws_are_buffers() -> None:
    one, two = (create_mixer("hyper_attention", 8, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    before = one.state_dict()["samples"].clone()
    torch.testing.assert_close(one.hash.directions, two.hash.directions)
    torch.testing.assert_close(before, two.samples)
    one.redraw(torch.Generator().manual_seed(5))
    assert not torch.equal(before, one.samples)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="block: expected at least 1"):
        create_mixer("hyper_attention", 8, 2, block=0)
    with pytest.raises(ValueError, match="border: expected 'masked'"):
        create_mixer("hyper_attention", 8, 2, border="zero")
    with pytest.raises(ValueError, match="num_projections: expected 1 to 30"):
        create_mixer("hyper_attention", 8, 2, num_projections=31)
    with pytest.raises(ValueError, match="hide_later: expected False with causal=True"):
        create_mixer("hyper_attention", 8, 2, causal=True, hide_later=True)
    with pytest.raises(UnsupportedError, match="context"):
        create_mixer("hyper_attention", 8, 2, hide_later=True)(torch.randn(1, 4, 8), torch.randn(1, 4, 8))
