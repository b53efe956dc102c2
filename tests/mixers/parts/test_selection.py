"""Selectors and pooled blocks against their definitions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab.mixers.parts.selection import (
    as_mask,
    block_means,
    chosen_places,
    group_tiles,
    smallest_share,
    sums_at,
    tokens_of_blocks,
    top_k,
)


def test_top_k_marks_what_is_not_allowed() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0], [2.0, 1.0, 0.0]])
    allowed = torch.tensor([[True, False, True], [False, False, True]])
    assert top_k(scores, 2, allowed).tolist() == [[2, 0], [2, -1]]
    assert top_k(scores, 9).tolist() == [[1, 2, 0], [0, 1, 2]]


@given(st.integers(1, 8), st.floats(0.05, 1.0))
def test_the_smallest_share_is_the_smallest(count, share) -> None:
    weights = torch.rand(5, count).double() + 0.01
    kept = smallest_share(weights, share)
    for row, chosen in zip(weights, kept, strict=True):
        ordered = row.sort(descending=True).values
        fewest = next(c for c in range(1, count + 1) if ordered[:c].sum() >= share * row.sum() - 1e-12)
        assert int(chosen.sum()) == fewest and row[chosen].sum() >= share * row.sum() - 1e-12


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4))
def test_places_and_masks_are_inverse(rows) -> None:
    chosen = torch.tensor(rows)
    places = chosen_places(chosen)
    assert places.shape[-1] == max(1, max(map(sum, rows)))
    assert as_mask(places, 4).tolist() == rows
    for row, found in zip(rows, places.tolist(), strict=True):
        assert [p for p in found if p >= 0] == [i for i, yes in enumerate(row) if yes]


def test_block_means_count_real_tokens() -> None:
    x = torch.arange(5.0).view(1, 1, 5, 1)
    mask = torch.tensor([[True, False, False, False, True]])
    means, some = block_means(x, 2, mask)
    assert means.flatten().tolist() == [0.0, 0.0, 4.0] and some.tolist() == [[True, False, True]]
    assert block_means(x, 2)[0].flatten().tolist() == [0.5, 2.5, 4.0]


def test_tokens_of_blocks_end_with_the_sequence() -> None:
    assert tokens_of_blocks(torch.tensor([2, 0, -1]), 2, 5).tolist() == [4, -1, 0, 1, -1, -1]


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=17), st.integers(1, 5))
def test_groups_are_cut_into_tiles_in_order(groups, size) -> None:
    places, owner = group_tiles(torch.tensor(groups)[None, None], 4, size)
    found = [(o, [p for p in row if p >= 0]) for o, row in zip(owner[0, 0].tolist(), places[0, 0].tolist(), strict=True)]
    members = {g: [i for i, group in enumerate(groups) if group == g] for g in range(4)}
    expected = [(g, members[g][i : i + size]) for g in range(4) for i in range(0, len(members[g]), size)]
    assert found == expected + [(-1, [])] * (len(found) - len(expected))


@given(st.lists(st.integers(-1, 4), min_size=6, max_size=6))
def test_sums_at_places(named) -> None:
    places, x = torch.tensor(named).view(1, 1, 2, 3), torch.randn(1, 1, 2, 3, 2)
    total, count = sums_at(x, places, 5)
    rows = x.flatten(0, 3)
    for place in range(5):
        here = [i for i, p in enumerate(named) if p == place]
        torch.testing.assert_close(total[0, 0, place], rows[here].sum(0))
        assert int(count[0, 0, place]) == len(here)
