"""The search space: its size, its members, draws, and what a candidate costs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from attnlab.compare.search_cost import candidate_flops
from attnlab.models import Candidate, CausalLM, LayerChoice, SearchSpace, create_search_space, search_spaces

TOY = SearchSpace(("softmax", "linear"), dims=(8,), depths=(1, 2), num_heads=(2,), hidden=(16, 32))


def test_all_candidates_are_there_once() -> None:
    everything = list(TOY)
    assert len(everything) == len(TOY) == len(set(everything)) == 4 + 16
    assert Candidate(8, (LayerChoice("linear", 2, 32), LayerChoice("softmax", 2, 16))) in everything
    assert len(SearchSpace()) == 2 * sum(12**depth for depth in range(1, 7))


def test_draws_come_from_the_generator_and_reach_everything() -> None:
    draws = [TOY.sample(torch.Generator().manual_seed(5)) for _ in range(2)]
    assert draws[0] == draws[1]
    generator = torch.Generator().manual_seed(0)
    counts = Counter(TOY.sample(generator) for _ in range(2000))
    assert set(counts) == set(TOY)
    depths = Counter(len(candidate.layers) for candidate in counts.elements())
    assert 0.45 < depths[1] / 2000 < 0.55


def test_a_candidate_builds_a_model() -> None:
    candidate = Candidate(8, (LayerChoice("softmax", 4, 12), LayerChoice("linear", 2, 24)))
    model = CausalLM(11, **candidate.model_options())
    assert [block.mixer.num_heads for block in model.blocks] == [4, 2]
    assert [block.channel_mixer.up.out_features for block in model.blocks] == [12, 24]
    assert model(torch.randint(11, (1, 5))).shape == (1, 5, 11)


def test_operations_against_a_count_by_hand() -> None:
    n, d = 32, 8
    projections = 4 * 2 * n * d * d
    flops = candidate_flops(Candidate(d, (LayerChoice("softmax", 2, 16),) * 3), n, causal=False)
    assert flops == 3 * (projections + 2 * 2 * n * n * d + 2 * 2 * n * d * 16)
    far = [candidate_flops(Candidate(d, (LayerChoice(mixer, 2, 16),)), 512) for mixer in ("softmax", "linear")]
    assert far[0] > 2 * far[1]


@pytest.mark.parametrize("options", [{"dims": ()}, {"hidden": (16, 16)}, {"num_heads": (0,)}, {"mixers": ()}])
def test_bad_choices(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SearchSpace(**{"mixers": ("softmax",), **options})


@pytest.mark.tier("T2", "search_space:efficient_transformers")
def test_the_published_space() -> None:
    space = create_search_space("efficient_transformers")
    assert space == SearchSpace(("softmax", "linear"), (512, 640), (1, 2, 3, 4, 5, 6), (4, 8), (1024, 2048, 3072))
    toy = create_search_space("efficient_transformers", mixers=("softmax", "delta_net"), hidden=(64,))
    assert {choice.mixer for choice in toy.layer_choices} == {"softmax", "delta_net"}
    assert search_spaces.info("efficient_transformers").paper == "nas-efficient-transformers"
