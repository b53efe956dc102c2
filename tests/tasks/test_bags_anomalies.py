"""Bags are positive by a key image alone, and anomalies stand in one stretch of one channel."""

from __future__ import annotations

import pytest
import torch

from attnlab.tasks import create_task, reference_model
from attnlab.tasks.anomalies import ranking_scores
from attnlab.tasks.digits import Digits


def digits_of(split):
    patches, labels = Digits(patch=1)._split(split)
    return {tuple(image.flatten().tolist()): int(label) for image, label in zip(patches, labels, strict=True)}


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_bag_is_positive_if_it_has_a_key(split):
    task = create_task("bags", bag_size=6, min_size=3, key=4, eval_examples=80)
    batch = task.draw(80, torch.Generator().manual_seed(0)) if split == "train" else task.examples("test")
    known = digits_of(split)
    for images, real, label in zip(batch.inputs, batch.mask, batch.targets, strict=True):
        shown = [known[tuple(image.tolist())] for image in images[real]]
        assert (4 in shown) == bool(label) and 3 <= len(shown) <= 6
    assert (batch.inputs[~batch.mask] == 0).all()
    assert 20 < batch.targets.sum() < 60


def test_a_positive_bag_of_one_is_its_key():
    batch = create_task("bags", bag_size=1, key=0).draw(50, torch.Generator().manual_seed(0))
    known = digits_of("train")
    assert all(
        (known[tuple(image[0].tolist())] == 0) == bool(label) for image, label in zip(batch.inputs, batch.targets, strict=True)
    )


def test_anomalies_are_one_stretch_of_one_channel():
    changed = create_task("anomalies", share=0.999999, patch=1, noise=0.0)
    normal = create_task("anomalies", share=1e-9, patch=1, noise=0.0)
    series, as_it_should_be = (task.draw(300, torch.Generator().manual_seed(0)) for task in (changed, normal))
    assert series.targets.all() and not as_it_should_be.targets.any()
    differs = series.inputs != as_it_should_be.inputs
    for where in differs:
        steps, channels = where.nonzero().unbind(1)
        assert len(channels.unique()) == 1 and len(steps) >= 1 and steps.max() - steps.min() < 12


def test_normal_series_are_sines_of_one_frequency():
    task = create_task("anomalies", share=1e-9, patch=1, noise=0.0, seq_len=64, length=4)
    series = task.draw(50, torch.Generator().manual_seed(0)).inputs
    assert (series.abs() <= 1.5).all()
    second = series[:, :-2] + series[:, 2:]  # = 2 cos(w) x of the middle
    ratio = (second * series[:, 1:-1]).sum((1, 2)) / series[:, 1:-1].square().sum((1, 2))
    torch.testing.assert_close(second, ratio[:, None, None] * series[:, 1:-1], rtol=1e-3, atol=1e-4)


def test_patches_are_stretches_of_all_channels():
    whole, cut = (create_task("anomalies", patch=patch).draw(3, torch.Generator().manual_seed(0)).inputs for patch in (1, 8))
    assert cut.shape == (3, 6, 24)
    assert torch.equal(cut[:, 1], whole[:, 8:16].flatten(1))


def test_ranking_scores_are_exact():
    task = create_task("anomalies", eval_examples=60)

    class Oracle(torch.nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.weight, self.sign = torch.nn.Parameter(torch.zeros(())), sign

        def forward(self, inputs, *, mask=None):
            batch = task.examples("valid")
            place = (inputs[:, None] == batch.inputs).all(-1).all(-1).int().argmax(1)
            score = self.sign * batch.targets[place].float()
            return torch.stack((-score, score), 1)

    assert ranking_scores(Oracle(1.0), task) == {"auroc": 1.0, "average_precision": 1.0}
    share = task.examples("valid").targets.float().mean().item()
    assert ranking_scores(Oracle(0.0), task) == pytest.approx({"auroc": 0.5, "average_precision": share})
    assert ranking_scores(Oracle(-1.0), task)["auroc"] == 0.0
    scores = ranking_scores(reference_model(task, "softmax", dim=8, depth=1).model, task, "test")
    assert 0.0 < scores["auroc"] < 1.0
    with pytest.raises(ValueError, match="expected normal and anomalous series in split 'valid', got one kind"):
        ranking_scores(Oracle(1.0), create_task("anomalies", share=1e-9, eval_examples=5))


def test_bad_options():
    with pytest.raises(ValueError, match="expected 1 <= min_size <= bag_size and a digit, got 4, 5 and 9"):
        create_task("bags", bag_size=4, min_size=5)
    with pytest.raises(ValueError, match="patch: expected a positive divisor of seq_len=48, got 7"):
        create_task("anomalies", patch=7)
    with pytest.raises(ValueError, match="expected length <= seq_len, positive numbers"):
        create_task("anomalies", length=49)
