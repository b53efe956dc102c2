"""Each problem's answers are worked out again from the text alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from attnlab.core.errors import UnknownNameError
from attnlab.tasks import IGNORE, create_task
from attnlab.tasks.sparse_frontier.problems import ASK, FIRST, NOTHING, PROBLEMS


def examples(problem, count=60, **options):
    """Facts as lists of symbols (fillers left out), the questions, and the answers with their places among these."""
    task = create_task("sparse_frontier", problem=problem, **{"seq_len": 48, **options})
    batch = task.draw(count, torch.Generator().manual_seed(0))
    tail = task.problem.tail(task.num_facts, task.num_queries)
    assert batch.inputs.shape == (count, task.seq_len) and batch.inputs.max() < task.model_options["vocab_size"]
    assert (batch.targets[:, :-tail] == IGNORE).all()
    size = task.problem.fact_tokens
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        symbols = [token for token in inputs[:-tail] if token >= FIRST or token == NOTHING]
        facts = [tuple(symbols[start : start + size]) for start in range(0, len(symbols), size)]
        assert len(facts) == task.problem.num_facts(task.num_facts)
        asked = inputs[-tail:]
        assert asked[0] == ASK
        yield facts, asked, targets[-tail:]


def pairs(asked, answers):
    """Questions with their answers; an answer stands in the input behind its question."""
    assert answers[0::2] == [IGNORE] * len(answers[0::2]) and asked[2::2] == answers[1:-1:2]
    return zip(asked[1::2], answers[1::2], strict=True)


@pytest.mark.parametrize("problem", ["niah", "story_retrieval"])
def test_values_are_those_of_the_keys(problem):
    for facts, asked, answers in examples(problem, num_queries=3):
        table = dict(facts)
        assert len(table) == 4 == len(set(table.values()))
        assert all(table[key] == value for key, value in pairs(asked, answers))
        assert len(set(asked[1::2])) == 3


def test_chapters_are_in_order_and_those_without_a_purchase_are_listed():
    for facts, asked, answers in examples("story_filtering", num_facts=7):
        assert [chapter for chapter, _ in facts] == list(range(FIRST, FIRST + 7))
        assert answers == [chapter for chapter, thing in facts if thing == NOTHING] and len(answers) == 2
        assert asked[1:] == answers[:-1]


def test_hops_go_to_the_purchase_before():
    for facts, asked, answers in examples("story_multi_hop", num_facts=7, num_queries=4):
        bought = [thing for _, thing in facts if thing != NOTHING]
        assert all(bought[bought.index(thing) - 1] == before for thing, before in pairs(asked, answers))
        assert bought[0] not in asked[1::2]


def test_variables_hold_the_value_that_begins_their_chain():
    for facts, asked, answers in examples("variable_tracking", num_facts=3):
        holds: dict[int, int] = {}
        for source, name in facts:
            holds[name] = holds.get(source, source)
        value = asked[1]
        assert answers[0] == IGNORE and answers[1:] == [name for name, held in holds.items() if held == value]
        assert len(answers[1:]) == 3 and asked[2:] == answers[1:-1]


def test_common_words_come_more_often():
    for facts, asked, answers in examples("common_words", num_facts=3):
        counts = Counter(facts)
        assert answers == sorted(word for (word,), times in counts.items() if times == 4) and len(answers) == 3
        assert sorted(counts.values()) == [1] * 6 + [4] * 3 and asked[1:] == answers[:-1]


def test_dispersion_bounds_where_facts_stand():
    def spans(dispersion):
        task = create_task("sparse_frontier", seq_len=200, num_facts=4, num_queries=1, dispersion=dispersion)
        inputs = task.draw(100, torch.Generator().manual_seed(0)).inputs[:, :-2]
        assert task.room == 190
        return torch.tensor([int((row >= FIRST).nonzero().max() - (row >= FIRST).nonzero().min()) for row in inputs])

    near, some, far = spans(0.0), spans(0.2), spans(1.0)
    assert (near <= 8).all() and (some <= 0.2 * 190 + 9).all() and some.max() > 25 and far.max() > 150


@pytest.mark.parametrize("problem", PROBLEMS)
def test_baselines_and_lengths_of_every_problem(problem):
    task = create_task("sparse_frontier", problem=problem, num_facts=6, seq_len=64, eval_examples=50)
    assert all(0 < value < 1 for value in task.baselines().values())
    assert task.examples("test").inputs.shape == (50, 64)


def test_bad_options():
    with pytest.raises(UnknownNameError, match="niah"):
        create_task("sparse_frontier", problem="naih")
    with pytest.raises(ValueError, match="expected at least 3 facts and from 1 to 1 queries for 'story_filtering', got 2 and 1"):
        create_task("sparse_frontier", problem="story_filtering", num_facts=2)
    with pytest.raises(ValueError, match="from 1 to 4 queries for 'niah', got 4 and 5"):
        create_task("sparse_frontier", num_queries=5)
    with pytest.raises(ValueError, match="seq_len, dispersion: expected at least 10 tokens and a share from 0 to 1, got 9"):
        create_task("sparse_frontier", seq_len=9, num_queries=1)
