from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from attnlab.tasks import create_task
from attnlab.tasks.icl.mixture import FRESH, Burst, Mixture, draw_sequences

BURST = Burst(num_pairs=6, max_pairs=9, copies=2, bursty=1.0, fresh=0.0, noise=0.0)


@pytest.fixture
def mixture():
    return Mixture.drawn(16, 4, 5, np.random.RandomState(0), 1.0)


def drawn(mixture, count=400, **changes):
    return draw_sequences(mixture, replace(BURST, **changes), count, np.random.RandomState(1))


def test_vectors_have_the_variance_and_classes_their_labels_in_turn():
    mixture = Mixture.drawn(4096, 64, 50, np.random.RandomState(0), 1.0)
    for vectors in (mixture.labels, mixture.classes):
        assert abs((vectors**2).sum(1).mean() - 1.0) < 4 * (2 / 50 / len(vectors)) ** 0.5
    assert (mixture.label_of[:130] == np.arange(130) % 64).all()
    assert mixture.probabilities[0] / mixture.probabilities[9] == pytest.approx(10.0)


def test_a_sequence_is_items_and_labels_in_turn_and_a_query(mixture):
    found = drawn(mixture)
    places, content = found.inputs[..., :19], found.inputs[..., 19:]
    starts = places[:, 0].argmax(-1)
    assert set(starts) == set(range(7)) and (places.sum(-1) == 1.0).all()
    assert (places.argmax(-1) == starts[:, None] + np.arange(13)).all()
    assert np.allclose(content[:, :-1:2], mixture.classes[found.context])
    assert np.allclose(content[:, 1::2], mixture.labels[found.context % 4])
    assert np.allclose(content[:, -1], mixture.classes[found.target_class])
    assert (found.label == found.target_class % 4).all()


def test_bursts_repeat_their_classes_and_have_the_querys(mixture):
    found = drawn(mixture)
    for row, target in zip(found.context, found.target_class, strict=True):
        counts = np.bincount(row, minlength=16)
        assert (counts % 2 == 0).all() and counts[target] >= 2
    loose = drawn(mixture, 4000, copies=0)
    present = (loose.context == loose.target_class[:, None]).any(1).mean()
    p = mixture.probabilities
    expected = (p * (1 - (1 - p) ** 6)).sum()
    assert abs(present - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


def test_new_classes_are_new_and_have_labels_of_their_own(mixture):
    found = drawn(mixture, 2000, fresh=0.25)
    new = found.target_class == -1
    assert abs(new.mean() - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    assert found.context[new].max() >= 16 and found.context.max() < FRESH
    items = found.inputs[new][:, :-1:2, 19:].reshape(-1, 1, 5)
    assert (np.abs(items - mixture.classes).max(-1).min(-1) > 1e-6).all()


def test_flips_move_the_labels_of_known_contexts_alone(mixture):
    plain, moved = drawn(mixture, fresh=0.5), drawn(mixture, fresh=0.5, flip=True)
    known = plain.target_class >= 0
    assert (plain.inputs[~known] == moved.inputs[~known]).all() and (plain.label == moved.label).all()
    labels = moved.inputs[known][:, 1::2, 19:]
    assert np.allclose(labels, mixture.labels[(moved.context[known] + 1) % 4])


def test_noise_keeps_the_variance_and_labels_can_be_distinct(mixture):
    noisy = drawn(mixture, 3000, noise=2.0)
    eta = noisy.inputs[:, -1, 19:] * 5**0.5 - mixture.classes[noisy.target_class]
    assert eta.var() * 5 / 4 == pytest.approx(1.0, abs=0.05)
    apart = drawn(mixture, 100, distinct_labels=True)
    assert all(len(set(row % 4)) == 3 == len(set(row)) for row in apart.context)


def test_the_test_sets_are_the_papers():
    common = {"num_classes": 32, "noise": 0.0, "eval_examples": 300}
    task = {name: create_task("in_context_classification", evaluate_on=name, **common) for name in ("flipped", "icl", "iwl")}
    size = 2 * 8 + 1
    for name in ("flipped", "icl"):
        batch = task[name].examples("test")
        content = batch.inputs[..., size:]
        same = torch.cdist(content[:, :-1:2], content[:, -1:])[..., 0] < 1e-3
        vectors = torch.from_numpy(task[name].mixture.labels).float()
        labels = torch.cdist(content[:, 1::2], vectors).argmin(-1)
        assert same.any(1).all() and ((labels == batch.targets[:, -1:]) | ~same).all()
    classes = torch.from_numpy(task["icl"].mixture.classes).float()
    assert (torch.cdist(task["icl"].examples("test").inputs[:, -1, size:], classes).min(1).values > 1e-3).all()
    content = task["iwl"].examples("test").inputs[..., size:]
    assert (torch.cdist(content[:, :-1:2], content[:, -1:])[..., 0] < 1e-3).any(1).float().mean() < 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 30}, "num_classes, num_labels: expected a multiple"),
        ({"copies": 3}, "num_pairs, copies: expected 2 to max_pairs pairs"),
        ({"bursty": 1.5}, r"bursty: expected a probability, got 1\.5"),
        ({"evaluate_on": "ood"}, "evaluate_on: expected one of"),
        ({"noise": -1.0}, "item_dim, noise"),
        ({"num_labels": 2, "num_pairs": 8, "distinct_labels": True}, "distinct_labels: expected at most 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_task("in_context_classification", **options)
