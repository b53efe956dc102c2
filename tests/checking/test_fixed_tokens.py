"""Mixers that are built for one number of tokens: what the contract refuses, and what the suite still proves of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnlab
from attnlab.checking.bench import squarest
from attnlab.core.contract import Mixer
from attnlab.core.info import Supports
from checking.toys import promising

PROMISES = Supports(mask=False, tokens_option="num_tokens", cost=2.0)


class LearnedMap(Mixer):
    """A learned matrix between the tokens."""

    def __init__(
        self, dim: int, num_heads: int = 8, *, causal: bool = False, num_tokens: int = 12, device=None, dtype=None
    ) -> None:
        super().__init__(dim, num_heads, causal=causal)
        self.num_tokens = num_tokens
        self.weight = nn.Parameter(torch.randn(num_tokens, num_tokens, device=device, dtype=dtype))

    def mix(self, x, context, masks, grid):
        n = x.shape[1]
        return self.weight[:n, :n] @ x


promising(LearnedMap, PROMISES)


def variant(base: Supports = PROMISES, **changes: object) -> type[Mixer]:
    return promising(type("Variant", (LearnedMap,), {"__doc__": "A learned matrix."}), base, **changes)


def ran(report: attnlab.checking.Report) -> set[str]:
    return {record.check for record in report.records if record.ran}


@pytest.mark.parametrize("grid", [{1}, {2}, {1, 2, 3}])
def test_a_mixer_of_fixed_size_can_keep_all_laws(grid):
    report = attnlab.check(variant(grid=frozenset(grid)))
    assert report.passed, str(report)
    assert {"single_token", "awkward_lengths", "grid_ranks", "cost_exponent", "bad_input", "refusals"} <= ran(report)


@pytest.mark.parametrize("grid", [{1}, {2}])
def test_a_built_one_is_looked_at_at_its_size(grid):
    report = attnlab.check(variant(grid=frozenset(grid))(16, 4, num_tokens=6))
    assert report.passed, str(report)
    assert {"single_token", "awkward_lengths", "cost_exponent"}.isdisjoint(ran(report))


def test_the_size_is_said_and_demanded():
    mixer = LearnedMap(8, 2, num_tokens=5)
    assert mixer.fixed_tokens == 5 and attnlab.create_mixer("softmax", 8, 2).fixed_tokens is None
    assert mixer(torch.randn(2, 5, 8)).shape == (2, 5, 8)
    for n in (1, 4, 6):
        with pytest.raises(ValueError, match=f"x: expected 5 tokens as num_tokens says, got {n}"):
            mixer(torch.randn(2, n, 8))


def test_lies_are_found():
    hidden = attnlab.check(variant(tokens_option=None))
    assert {"awkward_lengths"} <= {failure.check for failure in hidden.failures}
    named = attnlab.check(variant(tokens_option="num_token"), only="flags_agree")
    assert not named.passed
    streaming = attnlab.check(variant(causal="optional", streaming=True, state="grows"), only="flags_agree")
    assert "tokens_option" in streaming.failures[0].detail


def test_filters_tell_them_apart():
    assert "hiformer" in attnlab.list_mixers(tokens_option="num_slots")
    assert "hiformer" not in attnlab.list_mixers(tokens_option=None)


def test_grids_that_differ_least():
    assert [squarest(12, rank) for rank in (1, 2, 3)] == [(12,), (3, 4), (1, 3, 4)]
    assert squarest(7, 2) == (1, 7)
