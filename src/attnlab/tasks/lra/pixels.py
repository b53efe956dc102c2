"""CIFAR-10 as sequences of grey pixels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from attnlab.tasks.contract import Batch, Budget
from attnlab.tasks.files import MissingDataError, find_data
from attnlab.tasks.lra.drawing import pillow
from attnlab.tasks.lra.fixed import FixedSplits, Part
from attnlab.tasks.registry import tasks

TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = "test_batch.bin"
SIDE = 32
GREY = (0.2989, 0.5870, 0.1140)

Images = tuple[UInt8[np.ndarray, "_ 3 32 32"], Int[np.ndarray, "_"]]


def grey_levels(images: UInt8[np.ndarray, "n 3 h w"]) -> Int[Tensor, "n t"]:
    """0.2989 R + 0.5870 G + 0.1140 B, cut to integers, row by row."""
    levels = sum(weight * images[:, channel].astype(np.float32) for channel, weight in enumerate(GREY))
    return torch.from_numpy(np.asarray(levels).astype(np.int64).reshape(len(images), -1))


@tasks.register("cifar_pixels", family="long_range", paper="long-range-arena")
class CifarPixels(FixedSplits):
    """Which of ten things is it? CIFAR-10's pixels as grey levels one by one (Krizhevsky 2009; Tay et al. 2020).

    A pixel's level is its id, 1,024 tokens row by row. The last tenth of the training images validates. Read are the binary
    files ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, or PNG files in ``train/CLASS/`` and
    ``test/CLASS/`` (Pillow is needed; classes count in the order of their names, images too). The Python version of the data
    are pickles, and no file of yours is unpickled here: a pickle runs what it likes.

    Args:
        path: the folder; by default cifar_pixels in the folder that the variable ATTNLAB_DATA names.

    Raises:
        MissingDataError: if neither form of the data is there; says so where the pickles are.
        ValueError: for files of the wrong size, or classes that differ.
    """

    source = "www.cs.toronto.edu/~kriz/cifar.html, cifar-10-binary.tar.gz"
    num_classes = 10

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        train, test = _load(path, self.source)
        pixels, labels = grey_levels(train[0]), torch.from_numpy(train[1])
        kept = len(labels) - max(1, len(labels) // 10)
        self._pixels = {"train": pixels[:kept], "valid": pixels[kept:], "test": grey_levels(test[0])}
        self._labels = {"train": labels[:kept], "valid": labels[kept:], "test": torch.from_numpy(test[1])}

    @property
    def model_options(self) -> Mapping[str, Any]:
        """An encoder over grey levels with learned positions."""
        return {"num_classes": 10, "vocab_size": 256, "max_length": SIDE**2}

    @property
    def default_budget(self) -> Budget:
        """Tens of minutes on two cores; the published one is `attnlab.tasks.lra.published.published_settings`' "image"."""
        return Budget(steps=2000, batch_size=32, learning_rates=(0.001, 0.003), parameters=200_000, depth=2, num_heads=4)

    def labels(self, part: Part) -> Int[Tensor, "n"]:
        """The images' classes."""
        return self._labels[part]

    def batch(self, part: Part, rows: Int[Tensor, "b"]) -> Batch:
        """Pixels and classes."""
        return Batch(self._pixels[part][rows], self._labels[part][rows])

    def fingerprint(self) -> str:
        """Hash of all pixels and classes in order."""
        digest = hashlib.sha256(b"cifar_pixels")
        for part in ("train", "valid", "test"):
            digest.update(self._pixels[part].to(torch.uint8).numpy().tobytes() + self._labels[part].numpy().tobytes())
        return digest.hexdigest()


def _load(path: str | os.PathLike[str] | None, source: str) -> tuple[Images, Images]:
    try:
        folder = find_data("cifar_pixels", path, (*TRAIN, TEST), source)
    except MissingDataError as error:
        try:
            folder = find_data("cifar_pixels", path, ("train", "test"), source)
        except MissingDataError:
            raise MissingDataError(
                f"{error}. PNG files in train/CLASS/ and test/CLASS/ are read too; the pickles of the Python version are not, "
                "as unpickling runs what is in a file"
            ) from None
        return _read_pngs(folder)
    parts = [_read_binary(folder / name) for name in TRAIN]
    images, labels = (np.concatenate(values) for values in zip(*parts, strict=True))
    return (images, labels), _read_binary(folder / TEST)


def _read_binary(file: Path) -> Images:
    """Records of a label and 3 x 32 x 32 pixels, a byte each."""
    data = np.fromfile(file, dtype=np.uint8)
    size = 1 + 3 * SIDE**2
    if not len(data) or len(data) % size:
        raise ValueError(f"path: expected records of {size} bytes in {file}, got {len(data)} bytes")
    records = data.reshape(-1, size)
    if records[:, 0].max() > 9:
        raise ValueError(f"path: expected labels from 0 to 9 in {file}, got {records[:, 0].max()}")
    return records[:, 1:].reshape(-1, 3, SIDE, SIDE), records[:, 0].astype(np.int64)


def _read_pngs(folder: Path) -> tuple[Images, Images]:
    names = [sorted(entry.name for entry in (folder / part).iterdir() if entry.is_dir()) for part in ("train", "test")]
    if names[0] != names[1] or len(names[0]) != 10:
        raise ValueError(
            f"path: expected the same ten class folders in {folder}/train and {folder}/test, got {names[0]}, {names[1]}"
        )
    found = []
    for part in ("train", "test"):
        # by file name first, so that the last tenth of the training images has all classes
        files = sorted(
            (file.name, label, file) for label, name in enumerate(names[0]) for file in (folder / part / name).glob("*.png")
        )
        if not files:
            raise ValueError(f"path: expected .png files in {folder / part}, got none")
        images = [np.asarray(pillow().open(file).convert("RGB")) for _, _, file in files]
        if any(image.shape != (SIDE, SIDE, 3) for image in images):
            raise ValueError(f"path: expected images of {SIDE}x{SIDE} pixels in {folder / part}")
        found.append((np.stack(images).transpose(0, 3, 1, 2), np.array([label for _, label, _ in files])))
    return found[0], found[1]
