from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from attnlab.tasks import create_task
from attnlab.tasks.bigram_backcopy.language import BigramLanguage, backcopy_sequences, following

TEXT = "abracadabra, a cab bade a crab drab; " * 5


@pytest.fixture
def language():
    return BigramLanguage.of_text(TEXT, 2)


def test_frequencies_are_those_of_the_text(language):
    characters = sorted(set(TEXT))
    assert language.start == len(characters) and language.vocab_size == len(characters) + 1
    for x, first in enumerate(characters):
        assert language.marginal[x] == pytest.approx(TEXT.count(first) / len(TEXT))
        pairs = [after for before, after in itertools.pairwise(TEXT) if before == first]
        for y, second in enumerate(characters):
            assert language.transitions[x, y] == pytest.approx(pairs.count(second) / len(pairs))
    assert [characters[i] for i in language.triggers] == [" ", "a"]
    assert np.allclose(language.transitions[language.start], language.marginal)


def test_triggers_call_the_token_before_them(language):
    tokens = backcopy_sequences(language, 300, 40, np.random.default_rng(0))
    assert (tokens[:, 0] == language.start).all() and (tokens[:, 1:] != language.start).all()
    assert not language.is_trigger(tokens[:, 1]).any()
    rows, places = language.is_trigger(tokens[:, :-1]).nonzero()
    assert len(rows) > 1000 and (tokens[rows, places + 1] == tokens[rows, places - 1]).all()
    rows, places = (~language.is_trigger(tokens[:, 1:-1])).nonzero()
    assert (language.transitions[tokens[rows, places + 1], tokens[rows, places + 2]] > 0).all()


def test_numbers_are_taken_as_by_numpys_choice(language):
    plain = backcopy_sequences(language, 20, 30, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    for row in plain:
        tokens = [language.start]
        for _ in range(30):
            probabilities = np.diff(language.cumulative[tokens[-1]], prepend=0.0)
            drawn = rng.choice(language.vocab_size, p=probabilities)
            tokens.append(tokens[-2] if tokens[-1] in language.triggers else drawn)
        assert row.tolist() == tokens


def test_a_mix_copies_as_often_as_it_says(language):
    tokens = backcopy_sequences(language, 2000, 20, np.random.default_rng(0), 0.25)
    inside = tokens[:, 1:-1]
    rows, places = language.is_trigger(inside).nonzero()
    copied = tokens[rows, places + 2] == tokens[rows, places]
    by_chance = language.transitions[inside[rows, places], tokens[rows, places]]
    expected = (0.25 + 0.75 * by_chance).mean()
    assert abs(copied.mean() - expected) < 4 * (expected * (1 - expected) / len(rows)) ** 0.5


@pytest.mark.parametrize("mix_p", [1.0, 0.25])
def test_the_probabilities_are_those_drawn_with(language, mix_p):
    tokens = backcopy_sequences(language, 500, 20, np.random.default_rng(1), mix_p)
    assert (following(language, tokens, mix_p) > 0).all()
    first = tokens[:1].repeat(language.vocab_size, 0)
    first[:, -1] = np.arange(language.vocab_size)
    assert following(language, first, mix_p)[:, -1].sum() == pytest.approx(1.0)


def test_baselines_are_in_order():
    task = create_task("bigram_backcopy", eval_examples=100)
    values = task.baselines()
    assert values["uniform"] > values["unigram"] > values["bigram"] > values["source"] > 0
    mixed = create_task("bigram_backcopy", eval_examples=100, mix_p=0.5).baselines()
    assert mixed["source"] > values["source"]


def test_losses_after_triggers_and_elsewhere_add_up():
    task = create_task("bigram_backcopy", **create_task("bigram_backcopy").small)
    batch = next(task.eval_batches(10))
    found = task.metrics(torch.randn(10, 16, task.language.vocab_size), batch)
    assert found["copy_loss"][0] + found["bigram_loss"][0] == pytest.approx(found["loss"][0])
    assert found["copy_loss"][1] + found["bigram_loss"][1] == found["loss"][1] == 160.0


def test_a_text_of_ones_own_is_counted(tmp_path):
    (tmp_path / "text.txt").write_text("zażółć gęślą jaźń " * 20, encoding="utf-8")
    task = create_task("bigram_backcopy", path=tmp_path / "text.txt", num_triggers=2, eval_examples=5)
    assert task.language.vocab_size == len(set("zażółć gęślą jaźń ")) + 1
    with pytest.raises(ValueError, match="num_triggers: expected 1 to 14 of 15 different characters, got 15"):
        create_task("bigram_backcopy", path=tmp_path / "text.txt", num_triggers=15)
    with pytest.raises(ValueError, match=r"mix_p: expected a probability, got 1\.5"):
        create_task("bigram_backcopy", mix_p=1.5)
    with pytest.raises(ValueError, match="seq_len: expected at least 2, got 1"):
        create_task("bigram_backcopy", seq_len=1)
