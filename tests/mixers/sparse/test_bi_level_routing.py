"""Bi-level routing attention against its equations written out token by token, and its limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlab import create_mixer, record
from attnlab.core.errors import UnsupportedError
from mixers.definition import assert_defined_by, build, split_heads, tokens


def definition(mixer, grid, regions, k, soft, mask=None):
    """Whole (unpadded) tokens of each region by loops; the choice is made of numbers, without a gradient."""
    cells = list(itertools.product(*(range(n) for n in grid)))
    side = [-(-n // regions) for n in grid]
    region = [tuple(c // s for c, s in zip(cell, side, strict=True)) for cell in cells]
    names = sorted(set(region))

    def attend(x: Tensor) -> Tensor:
        q, keys, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
        outputs = []
        for b in range(len(x)):
            real = [i for i in range(len(cells)) if mask is None or mask[b, i]]
            members = {r: [i for i in real if region[i] == r] for r in names}
            names_here = [r for r in names if members[r]]
            rows = torch.zeros_like(v[b])
            for r in names_here:
                scores = torch.stack(
                    [q[b, members[r]].mean(0) @ keys[b, members[s]].mean(0) / math.sqrt(q.shape[-1]) for s in names_here]
                ).detach()
                best = sorted(range(len(names_here)), key=lambda s: -float(scores[s]))[:k]
                kept = torch.stack([scores[s] for s in best]).softmax(0)
                for i in members[r]:
                    heads = []
                    for qi, kh, vh in zip(
                        split_heads(q[b, i], mixer.num_heads),
                        split_heads(keys[b], mixer.num_heads),
                        split_heads(v[b], mixer.num_heads),
                        strict=True,
                    ):
                        logits, values = [], []
                        for weight, s in zip(kept, best, strict=True):
                            factor = weight if soft else 1.0
                            for j in members[names_here[s]]:
                                logits.append(qi @ (kh[j] * factor) / math.sqrt(q.shape[-1]))
                                values.append(vh[j] * factor)
                        heads.append(torch.stack(logits).softmax(0) @ torch.stack(values))
                    rows = rows.index_put((torch.tensor(i),), torch.cat(heads))
            outputs.append(rows)
        total = torch.stack(outputs)
        if mixer.position_name == "lepe":
            shown = v if mask is None else v * mask.unsqueeze(-1)
            conv = mixer.position.conv
            image = shown.mT.unflatten(-1, grid)
            local = F.conv2d(image, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
            total = total + local.flatten(2).mT
        y = mixer.out_proj(total)
        return y if mask is None else y * mask.unsqueeze(-1)

    return attend


@pytest.mark.tier("T2", "mixer:bi_level_routing")
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    ("grid", "regions", "k", "options"),
    [((6, 4), 2, 2, {}), ((5, 7), 3, 2, {"lepe_kernel": 3}), ((1, 7), 3, 9, {"lepe_kernel": 0}), ((4, 4), 4, 3, {"qk_dim": 6})],
    ids=str,
)
def test_equals_its_definition(grid, regions, k, options, soft) -> None:
    mixer = build("bi_level_routing", 12, 3, num_regions=regions, num_routed=k, soft_routing=soft, **options)
    x = tokens(math.prod(grid), 12)
    assert_defined_by(mixer, definition(mixer, grid, regions, k, soft), x, grid=grid)


@pytest.mark.tier("T2", "mixer:bi_level_routing")
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_any_sizes_and_masks(height, width, regions, k, soft, seed) -> None:
    mixer = build("bi_level_routing", 4, 2, num_regions=regions, num_routed=k, soft_routing=soft, lepe_kernel=3)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, height * width, generator=generator) < 0.6
    x = torch.randn(2, height * width, 4, generator=generator, dtype=torch.float64)
    expected = definition(mixer, (height, width), regions, k, soft, mask)(x)
    torch.testing.assert_close(mixer(x, mask=mask, grid=(height, width)), expected, rtol=1e-9, atol=1e-12)


def test_all_regions_are_dense_attention() -> None:
    routed = build("bi_level_routing", num_regions=3, num_routed=9, lepe_kernel=0)
    dense = build("softmax", qkv_bias=True)
    dense.load_state_dict(routed.state_dict())
    with torch.no_grad():
        dense.q_proj.weight.mul_(math.sqrt(4 / 12))  # the scale is of the whole width, not of a head
        dense.q_proj.bias.mul_(math.sqrt(4 / 12))
    x = tokens(35)
    torch.testing.assert_close(routed(x, grid=(5, 7)), dense(x, grid=(5, 7)))


def test_zero_tokens_beyond_the_grid_are_attended() -> None:
    """The released code's padding: the same as a larger grid with zeros in it."""
    mixer = build("bi_level_routing", num_regions=3, num_routed=2, lepe_kernel=3, border="zero_tokens")
    x = tokens(20)
    padded = F.pad(x.unflatten(1, (4, 5)), (0, 0, 0, 1, 0, 2)).flatten(1, 2)
    whole = mixer(padded, grid=(6, 6)).unflatten(1, (6, 6))[:, :4, :5]
    torch.testing.assert_close(mixer(x, grid=(4, 5)).unflatten(1, (4, 5)), whole)
    plain = build("bi_level_routing", num_regions=3, num_routed=2, lepe_kernel=3)
    assert float((plain(x, grid=(4, 5)) - mixer(x, grid=(4, 5))).detach().abs().max()) > 1e-3


def test_the_choice_is_recorded() -> None:
    mixer = build("bi_level_routing", num_regions=2, num_routed=3)
    with record(mixer) as tape:
        mixer(tokens(16), grid=(4, 4))
    assert tape["selection"].shape == tape["routing_weights"].shape == (2, 4, 3)
    torch.testing.assert_close(tape["routing_weights"].sum(-1), torch.ones(2, 4, dtype=torch.float64))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="num_routed: expected at least 1"):
        create_mixer("bi_level_routing", 8, 2, num_routed=0)
    with pytest.raises(ValueError, match="border: expected 'masked'"):
        create_mixer("bi_level_routing", 8, 2, border="cut")
    with pytest.raises(ValueError, match="qk_dim: expected a positive multiple"):
        create_mixer("bi_level_routing", 8, 2, qk_dim=3)
    with pytest.raises(ValueError, match="kernel_size: expected an odd number"):
        create_mixer("bi_level_routing", 8, 2, lepe_kernel=4)
    with pytest.raises(UnsupportedError, match="causal=True"):
        create_mixer("bi_level_routing", 8, 2, causal=True)
