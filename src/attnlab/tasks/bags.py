"""Multiple-instance bags: is one of the images in the bag a given digit?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnlab.tasks.contract import Batch, Budget, Split
from attnlab.tasks.digits import Digits
from attnlab.tasks.generated import GeneratedTask
from attnlab.tasks.registry import tasks
from attnlab.tasks.scores import token_accuracy


@tasks.register("bags", family="classification")
class Bags(GeneratedTask):
    r"""Bags of digits' images; a bag is positive if at least one shows the key digit (Ilse et al. 2018, on other images).

    A bag's images are its tokens, 64 pixels each, without order. Half of the bags are positive: these have one key image or more,
    each further image being a key with the digit's own chance of a tenth; the others have none. Bags of the validation and test
    splits hold images of these splits of "digits" alone. Attention pooling that finds the key images solves it; of a model it is
    asked only whether there is one.

    A draw takes the labels, the sizes of bags where they vary, a number an image (key or not), a place a bag (the certain key),
    and a number an image (which).

    Args:
        bag_size: the most images in a bag.
        min_size: the fewest; sizes between are as likely. None is ``bag_size``.
        key: the digit that makes a bag positive.
        eval_examples: bags in each evaluation split.
        seed: of the evaluation bags.

    Raises:
        ValueError: for sizes or a digit out of range.
    """

    kind = "classification"
    model = "encoder"
    metric = "accuracy"
    higher_is_better = True
    small: ClassVar[Mapping[str, Any]] = {"eval_examples": 40, "min_size": 4}

    def __init__(
        self, bag_size: int = 8, min_size: int | None = None, key: int = 9, *, eval_examples: int = 360, seed: int = 0
    ) -> None:
        self.bag_size, self.min_size, self.key = bag_size, bag_size if min_size is None else min_size, key
        if not 1 <= self.min_size <= bag_size or not 0 <= key <= 9:
            raise ValueError(
                f"bag_size, min_size, key: expected 1 <= min_size <= bag_size and a digit, got {bag_size}, {min_size} and {key}"
            )
        self._images = {split: _split_by_key(split, key) for split in ("train", "valid", "test")}
        super().__init__(eval_examples, seed)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """An encoder over images as tokens, without positions: a bag has no order."""
        return {
            "num_classes": 2,
            "input": "patches",
            "patch_dim": 64,
            "position": "none",
            "max_length": self.bag_size,
        }

    @property
    def default_budget(self) -> Budget:
        """5 to 10 seconds on one core at the default sizes."""
        return Budget(steps=400, batch_size=32, learning_rates=(0.003, 0.01), parameters=40_000, depth=2, num_heads=4)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` new bags of training images."""
        return self._draw(count, generator, "train")

    def draw_split(self, count: int, generator: torch.Generator, split: Split) -> Batch:
        """Bags of the split's images."""
        return self._draw(count, generator, split)

    def _draw(self, count: int, generator: torch.Generator, split: str) -> Batch:
        keys, others = self._images[split]
        labels = torch.randint(2, (count,), generator=generator)
        sizes = torch.full((count,), self.bag_size)
        if self.min_size < self.bag_size:
            sizes = torch.randint(self.min_size, self.bag_size + 1, (count,), generator=generator)
        is_key = torch.rand(count, self.bag_size, generator=generator) < 0.1
        certain = (torch.rand(count, generator=generator) * sizes).long()
        is_key = is_key.scatter(1, certain[:, None], True) & labels[:, None].bool()
        which = torch.rand(count, self.bag_size, generator=generator)
        images = torch.where(is_key[..., None], keys[(which * len(keys)).long()], others[(which * len(others)).long()])
        mask = None
        if self.min_size < self.bag_size:
            mask = torch.arange(self.bag_size) < sizes[:, None]
            images = images.masked_fill(~mask[..., None], 0.0)
        return Batch(images, labels, mask)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of bags judged rightly."""
        return token_accuracy(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of the more frequent answer, and of the nearest class mean of the bags' mean images."""
        batch, known = self.examples(split), self._draw(2000, torch.Generator().manual_seed(4 * self.seed + 3), "train")
        positive = float(batch.targets.double().mean())
        means = [_mean_images(known)[known.targets == label].mean(0) for label in (0, 1)]
        nearest = torch.cdist(_mean_images(batch), torch.stack(means)).argmin(1)
        return {
            "majority": max(positive, 1.0 - positive),
            "nearest_mean": float((nearest == batch.targets).double().mean()),
        }


def _split_by_key(split: str, key: int) -> tuple[Tensor, Tensor]:
    """A split's images of the key digit, and its others, as rows of pixels."""
    patches, labels = Digits(patch=1)._split(split)
    images = patches.flatten(1)
    return images[labels == key], images[labels != key]


def _mean_images(batch: Batch) -> Tensor:
    sizes = batch.inputs.shape[1] if batch.mask is None else batch.mask.sum(1, keepdim=True)
    return batch.inputs.sum(1) / sizes
