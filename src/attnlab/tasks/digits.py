"""Handwritten digits as grids of patches: 8x8 images that scikit-learn carries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.tasks.contract import Batch, Budget, Split, Task
from attnlab.tasks.registry import tasks
from attnlab.tasks.scores import token_accuracy

_SIZES = {"test": 360, "valid": 360}  # of 1797; the rest trains


@lru_cache(maxsize=1)
def _load() -> tuple[Float[Tensor, "n 8 8"], Int[Tensor, "n"]]:
    """Images with mean 0 and standard deviation about 1, and their digits, in a fixed shuffled order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()
    return ((images - 4.9) / 6.0)[order], torch.from_numpy(data.target).long()[order]


@tasks.register("digits", family="classification")
class Digits(Task):
    """Which of ten digits is it? 1797 images of 8x8 pixels (Alpaydin and Kaynak 1998): 1077 train, 360 validate, 360 test.

    Args:
        patch: side of a patch: 1 (64 tokens on an 8x8 grid), 2 (16 tokens) or 4 (4 tokens).

    Raises:
        ValueError: for another patch side.
    """

    kind = "classification"
    model = "encoder"
    metric = "accuracy"
    higher_is_better = True

    def __init__(self, patch: int = 1) -> None:
        if patch not in (1, 2, 4):
            raise ValueError(f"patch: expected 1, 2 or 4, got {patch}")
        self.patch = patch
        images, self._labels = _load()
        self._patches = rearrange(images, "n (h p) (w q) -> n (h w) (p q)", p=patch, q=patch).contiguous()
        test, valid = _SIZES["test"], _SIZES["valid"]
        self._ranges = {"test": (0, test), "valid": (test, test + valid), "train": (test + valid, len(images))}

    @property
    def model_options(self) -> Mapping[str, Any]:
        """An encoder over the patch grid with learned positions."""
        side = 8 // self.patch
        return {"num_classes": 10, "input": "patches", "patch_dim": self.patch**2, "grid": (side, side)}

    @property
    def default_budget(self) -> Budget:
        """2 to 5 seconds on one core with patches of one pixel."""
        return Budget(steps=200, batch_size=32, learning_rates=(0.005, 0.01), parameters=30_000, depth=2, num_heads=4)

    def _split(self, name: str) -> tuple[Float[Tensor, "n t p"], Int[Tensor, "n"]]:
        start, end = self._ranges[name]
        return self._patches[start:end], self._labels[start:end]

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Training images drawn with replacement."""
        patches, labels = self._split("train")
        while True:
            chosen = torch.randint(len(labels), (batch_size,), generator=generator)
            yield Batch(patches[chosen], labels[chosen])

    def eval_batches(self, batch_size: int, split: Split = "valid") -> Iterator[Batch]:
        """All images of a split."""
        patches, labels = self._split(split)
        for some, targets in zip(patches.split(batch_size), labels.split(batch_size), strict=True):
            yield Batch(some, targets)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, tuple[float, float]]:
        """Share of images with the right digit."""
        return token_accuracy(logits, batch)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of the most frequent digit, and of the nearest class mean in pixels."""
        patches, labels = self._split("train")
        images, digits = self._split(split)
        counts = torch.bincount(labels, minlength=10)
        sums = torch.zeros(10, patches[0].numel()).index_add_(0, labels, patches.flatten(1))
        nearest = torch.cdist(images.flatten(1), sums / counts[:, None]).argmin(1)
        return {
            "majority": float((digits == counts.argmax()).float().mean()),
            "nearest_centroid": float((digits == nearest).float().mean()),
        }

    def fingerprint(self) -> str:
        """Hash of the patches and labels in order."""
        return hashlib.sha256(self._patches.numpy().tobytes() + self._labels.numpy().tobytes()).hexdigest()
