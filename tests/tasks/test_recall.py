from __future__ import annotations

import pytest
import torch

from attnlab.tasks import IGNORE, create_task
from attnlab.tasks.recall import gap_weights


def test_sequences_are_the_definition():
    task = create_task("recall", seq_len=32, num_pairs=5, vocab_size=40)
    batch = task.draw(200, torch.Generator().manual_seed(0))
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        keys, values = inputs[:10:2], inputs[1:10:2]
        assert len(set(keys)) == len(set(values)) == 5
        assert all(1 <= key < 20 for key in keys) and all(20 <= value < 40 for value in values)
        queries = {t: target for t, target in enumerate(targets) if target != IGNORE}
        assert len(queries) == 5 and all(t >= 10 and t % 2 == 0 for t in queries)
        assert {inputs[t]: target for t, target in queries.items()} == dict(zip(keys, values, strict=True))


def test_what_fills_the_gaps():
    plain = create_task("recall", seq_len=64, num_pairs=4, vocab_size=32, random_non_queries=False)
    batch = plain.draw(50, torch.Generator().manual_seed(0))
    assert (batch.inputs[:, 8:][batch.targets[:, 8:] == IGNORE] == 0).all()
    filled = create_task("recall", seq_len=64, num_pairs=4, vocab_size=32).draw(50, torch.Generator().manual_seed(0))
    fillers = filled.inputs[:, 8:][filled.targets[:, 8:] == IGNORE]
    assert fillers.unique().tolist() == list(range(32))


def test_queries_take_their_slots_by_the_power_law():
    task = create_task("recall", seq_len=22, num_pairs=1, vocab_size=8, power=0.01)
    batch = task.draw(20_000, torch.Generator().manual_seed(0))
    counts = (batch.targets != IGNORE).sum(0)[2::2]
    expected = torch.arange(1, 11, dtype=torch.float64) ** -0.99
    expected /= expected.sum()
    assert torch.equal(gap_weights(10, 0.01), expected)
    deviation = (20_000 * expected * (1 - expected)).sqrt()
    assert ((counts - 20_000 * expected).abs() < 4 * deviation).all()


def test_a_full_sequence_has_a_query_in_every_slot():
    batch = create_task("recall", seq_len=16, num_pairs=4, vocab_size=16).draw(20, torch.Generator().manual_seed(0))
    assert ((batch.targets[:, 8::2] != IGNORE).all(1)).all()


def test_baselines_are_what_guessing_scores():
    task = create_task("recall", seq_len=64, num_pairs=4, vocab_size=32, eval_examples=4000)
    (batch,) = task.eval_batches(4000)
    asked = batch.targets != IGNORE
    right = batch.targets[asked]
    among_all = torch.randint(16, 32, right.shape) == right
    choice = torch.randint(4, right.shape) * 2 + 1
    in_context = batch.inputs[asked.nonzero()[:, 0], choice] == right
    for guess, name in ((among_all, "any_value"), (in_context, "value_in_context")):
        p = task.baselines()[name]
        assert abs(guess.double().mean().item() - p) < 4 * (p * (1 - p) / len(right)) ** 0.5


def test_bad_sizes():
    with pytest.raises(ValueError, match="an even seq_len of at least 4 num_pairs, got 30 and 8"):
        create_task("recall", seq_len=30, num_pairs=8)
    with pytest.raises(ValueError, match="vocab_size: expected at least 18 for 8 keys, got 16"):
        create_task("recall", seq_len=64, num_pairs=8, vocab_size=16)
