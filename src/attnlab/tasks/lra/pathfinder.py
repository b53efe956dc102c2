"""Pathfinder and Path-X as a task."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int, UInt8
from torch import Tensor

from attnlab.tasks.contract import Batch, Budget, Split
from attnlab.tasks.lra.fixed import FixedSplits, Part
from attnlab.tasks.lra.pathfinder_images import PathfinderGenerator
from attnlab.tasks.lra.pathfinder_settings import PATHFINDER, PathfinderSettings
from attnlab.tasks.lra.shards import Arrays, build_shards, piece_sizes
from attnlab.tasks.registry import tasks

SHARD = 200
"""Images a piece; each piece has streams of its own."""


def pathfinder_shard(number: int, size: int, *, settings: PathfinderSettings, seed: int) -> Arrays:
    """``size`` images and labels of the streams of a piece.

    Piece 0 has ``RandomState(seed)`` and ``random.Random(seed)``, piece k has ``RandomState([seed, k])`` and
    ``random.Random(seed + k * 2**32)``.
    """
    numbers = np.random.RandomState(seed if number == 0 else [seed, number])
    shuffler, generator = random.Random(seed + (number << 32)), PathfinderGenerator(settings)
    drawn = [generator.draw(numbers, shuffler) for _ in range(size)]
    return {
        "images": np.stack([image for image, _ in drawn]),
        "labels": np.array([label for _, label in drawn], dtype=np.uint8),
    }


@tasks.register("pathfinder", family="long_range", paper="long-range-arena")
class Pathfinder(FixedSplits):
    r"""Pathfinder: do the two marked ends lie on one dashed contour, or on two? (Linsley et al. 2018; Tay et al. 2020.)

    Images are drawn as `attnlab.tasks.lra.pathfinder_images.PathfinderGenerator` says; the first train, the next validate, the
    last test. The defaults are small and learnt within seconds. Published are ``size=32`` (1,024 tokens) and ``size=128``
    (Path-X, 16,384 tokens) with ``patch=0, train_examples=160000, eval_examples=20000``; drawing these takes a core about
    half an hour and a day, which ``path`` keeps and ``processes`` share. The published loader marks black pixels, most of an
    image, as padding; here all pixels take part.

    Args:
        size: side of the image: 16 (ours), 32, 64, 128 or 256.
        contour_length: segments of both contours; by default the size's own. Published are 6, 9 and 14, easy to hard.
        num_distractors: further contours; by default the size's own.
        patch: 0 reads pixels as ids from 0 to 255, row by row; otherwise tokens are square patches of this side, as numbers.
        train_examples: images to train on.
        eval_examples: images in each evaluation split.
        seed: of all of them.
        path: a folder where images are kept as they are drawn, and found again.
        processes: that draw images.

    Raises:
        ImportError: without Pillow.
        ValueError: for sizes that do not fit, or a folder with images of other settings.
    """

    small: ClassVar[Mapping[str, Any]] = {"train_examples": 24, "eval_examples": 16}
    num_classes = 2

    def __init__(
        self,
        size: int = 16,
        *,
        contour_length: int | None = None,
        num_distractors: int | None = None,
        patch: int = 4,
        train_examples: int = 8000,
        eval_examples: int = 400,
        seed: int = 0,
        path: str | os.PathLike[str] | None = None,
        processes: int = 1,
    ) -> None:
        if size not in PATHFINDER:
            raise ValueError(f"size: expected one of {sorted(PATHFINDER)}, got {size}")
        if patch < 0 or (patch and size % patch):
            raise ValueError(f"patch: expected 0 or a divisor of size={size}, got {patch}")
        if train_examples < 1 or eval_examples < 1 or not 0 <= seed < 2**32:
            raise ValueError(
                "train_examples, eval_examples, seed: expected positive integers and one of 32 bits, "
                f"got {train_examples}, {eval_examples} and {seed}"
            )
        own: dict[str, Any] = {"contour_length": contour_length, "num_distractors": num_distractors}
        self.settings = replace(PATHFINDER[size], **{name: value for name, value in own.items() if value is not None})
        self.size, self.patch = size, patch
        self.seed, self.folder, self.processes = seed, None if path is None else Path(path), processes
        total = train_examples + 2 * eval_examples
        ends = {"train": train_examples, "valid": train_examples + eval_examples, "test": total}
        self._starts = {"train": 0, "valid": ends["train"], "test": ends["valid"]}
        self._ends = ends

    @cached_property
    def _drawn(self) -> tuple[UInt8[Tensor, "n s s"], Int[Tensor, "n"]]:
        """Images and labels of all splits, drawn or read when they are first asked for."""
        total = self._ends["test"]
        pieces = build_shards(
            partial(pathfinder_shard, settings=self.settings, seed=self.seed),
            piece_sizes(total, SHARD, kept=self.folder is not None),
            folder=self.folder,
            facts={"task": "pathfinder", "seed": self.seed, "shard": SHARD, **asdict(self.settings)},
            processes=self.processes,
        )
        images, labels = (np.concatenate([piece[name] for piece in pieces])[:total] for name in ("images", "labels"))
        return torch.from_numpy(images), torch.from_numpy(labels).long()

    @property
    def model_options(self) -> Mapping[str, Any]:
        """An encoder over the pixels as a sequence, or over a grid of patches."""
        if not self.patch:
            return {"num_classes": 2, "vocab_size": 256, "max_length": self.size**2}
        side = self.size // self.patch
        return {"num_classes": 2, "input": "patches", "patch_dim": self.patch**2, "grid": (side, side)}

    @property
    def default_budget(self) -> Budget:
        """About 15 seconds on one core at the default sizes, after 7 for drawing."""
        return Budget(steps=1200, batch_size=64, learning_rates=(0.003, 0.005), parameters=40_000, depth=2, num_heads=4)

    def images(self, part: Part) -> UInt8[Tensor, "n s s"]:
        """All images of a split."""
        return self._drawn[0][self._starts[part] : self._ends[part]]

    def labels(self, part: Part) -> Int[Tensor, "n"]:
        """1 where both markers are on one contour."""
        return self._drawn[1][self._starts[part] : self._ends[part]]

    def batch(self, part: Part, rows: Int[Tensor, "b"]) -> Batch:
        """Images and labels."""
        images, targets = self.images(part)[rows], self.labels(part)[rows]
        if not self.patch:
            return Batch(images.flatten(1).long(), targets)
        tokens = rearrange(images.float() / 64.0, "b (h p) (w q) -> b (h w) (p q)", p=self.patch, q=self.patch)
        return Batch(tokens.contiguous(), targets)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of the most frequent class, and of the nearest class mean of the images' centres of brightness and spread."""
        means = [_moments(self.images("train"))[self.labels("train") == label].mean(0) for label in (0, 1)]
        nearest = torch.cdist(_moments(self.images(split)), torch.stack(means)).argmin(1)
        return {
            "majority": self.best_guess(split),
            "brightness": float((nearest == self.labels(split)).double().mean()),
        }

    def fingerprint(self) -> str:
        """Hash of all images and labels in order, and of how they are read."""
        digest = hashlib.sha256(f"pathfinder {self.patch} {self._ends}".encode())
        digest.update(b"".join(part.numpy().tobytes() for part in self._drawn))
        return digest.hexdigest()


def _moments(images: UInt8[Tensor, "n s s"]) -> Tensor:
    """Share of bright pixels, and how far the very brightest, the markers, are spread."""
    bright = images.double() / 255.0
    markers = (images >= 250).double().flatten(1)
    side = images.shape[-1]
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).double().view(-1, 2)
    count = markers.sum(1, keepdim=True).clamp(min=1)
    mean = markers @ at / count
    spread = (markers @ at.square() / count - mean.square()).sum(1).clamp(min=0).sqrt() / side
    return torch.stack((10 * bright.mean((1, 2)), spread), 1)
