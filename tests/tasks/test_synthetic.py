"""Copying, induction and needles: the examples are what the tasks are defined by, and guesses score what the baselines say."""

from __future__ import annotations

import pytest
import torch

from attnlab.tasks import IGNORE, create_task
from attnlab.tasks.synthetic.copying import ASK, MARK, NOISE
from attnlab.tasks.synthetic.induction import TRIGGER
from attnlab.tasks.synthetic.insertion import insert


def drawn(name, examples=100, **options):
    return create_task(name, **options).draw(examples, torch.Generator().manual_seed(0))


def test_copies_follow_the_second_mark():
    batch = drawn("copy", length=5, vocab_size=9)
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        data = inputs[1:6]
        assert inputs == [MARK, *data, MARK, *data[:-1]] and MARK not in data
        assert targets == [IGNORE] * 6 + data


def test_data_are_asked_for_in_order():
    batch = drawn("selective_copy", length=12, num_data=5, vocab_size=10)
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        data = [token for token in inputs[:12] if token != NOISE]
        assert inputs[12:] == [ASK] * 5 and targets == [IGNORE] * 12 + data
        assert len(data) == 5 and ASK not in data


def test_data_stand_anywhere():
    batch = drawn("selective_copy", 6000, length=6, num_data=2, vocab_size=10)
    shares = (batch.inputs[:, :6] != NOISE).double().mean(0)
    assert ((shares - 1 / 3).abs() < 4 * (2 / 9 / 6000) ** 0.5).all()


def test_the_trigger_comes_twice_and_its_successor_is_asked_for():
    task = create_task("induction", seq_len=8, vocab_size=5, eval_length=20)
    batch = task.draw(400, torch.Generator().manual_seed(0))
    firsts = set()
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        first = inputs.index(TRIGGER)
        assert [place for place, token in enumerate(inputs) if token == TRIGGER] == [first, 7]
        assert targets == [IGNORE] * 7 + [inputs[first + 1]] and inputs[first + 1] != TRIGGER
        firsts.add(first)
    assert firsts == set(range(6))
    assert task.examples("valid").inputs.shape[1] == 20


def test_needles_are_lines_of_the_text_and_the_first_is_asked_for():
    task = create_task("needle", seq_len=90, num_needles=3, value_length=3, max_bytes=1_500_000)
    for batch, split in ((task.draw(30, torch.Generator().manual_seed(0)), "train"), (task.examples("test"), "test")):
        text = task.corpus.splits[split].numpy().tobytes()
        assert batch.inputs.shape == batch.targets.shape == (len(batch), 90)
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            whole = bytes([*inputs, targets[-1]])
            value, question = whole[-3:], whole[-7:-3]
            assert bytes(target for target in targets if target != IGNORE) == value == bytes(targets[-3:])
            assert question[:1] == b"#" and question[-1:] == b"=" and question[1:3].isupper() and value.isdigit()
            assert whole[:-7].count(b"\n" + question + value + b"\n") == 1
            assert any(whole[start : start + 8] in text for start in range(82))


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (1.0, 60)])
def test_depth_places_the_needle(depth, place):
    task = create_task("needle", seq_len=75, num_needles=1, depth=depth, key_length=2, value_length=3, max_bytes=1_500_000)
    assert task.room == 60
    for row in task.draw(5, torch.Generator().manual_seed(0)).inputs.tolist():
        assert bytes(row[place : place + 2]) == b"\n#" and row[place + 4] == ord("=")


def test_insertion_keeps_both_orders():
    hay = torch.arange(5)[None]
    lines = [torch.tensor([[10, 11]]), torch.tensor([[20, 21]])]
    assert insert(hay, lines, torch.tensor([[2, 2]])).tolist() == [[0, 1, 10, 11, 20, 21, 2, 3, 4]]
    assert insert(hay, lines, torch.tensor([[5, 0]])).tolist() == [[20, 21, 0, 1, 2, 3, 4, 10, 11]]


@pytest.mark.parametrize("name", ["copy", "selective_copy"])
def test_a_guess_among_the_tokens_of_an_example_scores_its_baseline(name):
    task = create_task(name, eval_examples=4000)
    batch = task.examples("valid")
    asked = (batch.targets != IGNORE).nonzero()
    data = batch.inputs[:, 1:9] if name == "copy" else batch.inputs[batch.inputs > ASK].view(4000, -1)
    generator = torch.Generator().manual_seed(0)
    guess = data[asked[:, 0], torch.randint(data.shape[1], (len(asked),), generator=generator)]
    p = task.baselines()["token_in_context"]
    hits = (guess == batch.targets[asked[:, 0], asked[:, 1]]).double().mean().item()
    assert abs(hits - p) < 4 * (p * (1 - p) / len(asked)) ** 0.5


def test_answers_count_whole_examples():
    task = create_task("copy", length=3)
    batch = task.draw(4, torch.Generator().manual_seed(0))
    perfect = torch.nn.functional.one_hot(batch.targets.clamp(min=0), task.vocab_size) * 10.0
    perfect[0, -1] = 0.0
    perfect[0, -1, MARK] = 1.0
    scores = task.metrics(perfect, batch)
    assert scores["answers"] == (3.0, 4.0) and scores["accuracy"] == (11.0, 12.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("copy", {"length": 0}, "length, vocab_size: expected at least 1 and 3, got 0 and 16"),
        ("selective_copy", {"num_data": 17}, "expected 1 <= num_data <= length and at least 4 ids, got 16, 17 and 16"),
        ("induction", {"seq_len": 2}, "expected at least 3, got 2, None and 17"),
        ("needle", {"seq_len": 13}, "expected needles and question to leave room"),
        ("needle", {"depth": 1.5}, "depth: expected a number from 0 to 1 or None, got 1.5"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_task(name, **options)
