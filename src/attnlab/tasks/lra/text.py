"""Byte-level text classification over a folder of texts in IMDb's layout."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from attnlab.tasks.contract import Batch, Budget
from attnlab.tasks.files import find_data
from attnlab.tasks.lra.fixed import FixedSplits, Part, pad_right
from attnlab.tasks.registry import tasks

FOLDERS = ("train/neg", "train/pos", "test/neg", "test/pos")
"""What the folder has, each with ``.txt`` files."""


@tasks.register("lra_text", family="long_range", paper="long-range-arena")
class ByteText(FixedSplits):
    """Is a film review kind? Its bytes one by one, as Long Range Arena reads IMDb (Maas et al. 2011; Tay et al. 2020).

    Ids are bytes + 1, 0 pads. The published setting has no validation texts of its own: the 25,000 test reviews are both. Any
    other texts of two classes in the same folders will do.

    Args:
        path: the folder ``aclImdb`` with train/neg, train/pos, test/neg and test/pos; by default
            lra_text in the folder that the variable ATTNLAB_DATA names.
        max_length: bytes that are read, padded to: 1000 in the published code, 4000 in the paper's table.
        held_out: share of the training texts that validate instead of the test texts, chosen by a hash of their names.

    Raises:
        MissingDataError: if the folder is not there.
        ValueError: for a size out of range, or a split without texts.
    """

    source = "ai.stanford.edu/~amaas/data/sentiment, aclImdb_v1.tar.gz"
    num_classes = 2

    def __init__(self, path: str | os.PathLike[str] | None = None, *, max_length: int = 1000, held_out: float = 0.0) -> None:
        if max_length < 1 or not 0.0 <= held_out < 1.0:
            raise ValueError(
                f"max_length, held_out: expected a positive integer and a share below 1, got {max_length}, {held_out}"
            )
        folder = find_data("lra_text", path, FOLDERS, self.source)
        self.max_length = max_length
        train, test = _texts(folder, "train"), _texts(folder, "test")
        valid = [found for found in train if _place(found[0]) < held_out]
        self._files = {
            "train": [found for found in train if _place(found[0]) >= held_out],
            "valid": valid if held_out else test,
            "test": test,
        }
        for part, found in self._files.items():
            if not found:
                raise ValueError(f"path: expected .txt files for the {part} split in {folder}, got none")
        self._labels = {part: torch.tensor([label for _, label in found]) for part, found in self._files.items()}

    @property
    def model_options(self) -> Mapping[str, Any]:
        """An encoder over bytes."""
        return {"num_classes": 2, "vocab_size": 257, "max_length": self.max_length}

    @property
    def default_budget(self) -> Budget:
        """Tens of minutes on two cores; the published one is `attnlab.tasks.lra.published.published_settings`' "text"."""
        return Budget(steps=2000, batch_size=32, learning_rates=(0.001, 0.003), parameters=200_000, depth=2, num_heads=4)

    def labels(self, part: Part) -> Int[Tensor, "n"]:
        """1 for texts of ``pos``."""
        return self._labels[part]

    def batch(self, part: Part, rows: Int[Tensor, "b"]) -> Batch:
        """Texts, read from their files, and classes."""
        files = self._files[part]
        texts = []
        for row in rows.tolist():
            with files[row][0].open("rb") as stream:
                texts.append(stream.read(self.max_length))
        ids, mask = pad_right(texts, self.max_length, shift=1)
        return Batch(ids, self._labels[part][rows], mask)

    def fingerprint(self) -> str:
        """Hash of the names and contents of all files, and of how they are split and cut."""
        digest = hashlib.sha256(f"lra_text {self.max_length}".encode())
        for part, found in self._files.items():
            for file, label in found:
                digest.update(f"{part} {label} {file.name}\0".encode() + file.read_bytes())
        return digest.hexdigest()


def _texts(folder: Path, part: str) -> list[tuple[Path, int]]:
    return [(file, label) for label, name in enumerate(("neg", "pos")) for file in sorted((folder / part / name).glob("*.txt"))]


def _place(file: Path) -> float:
    """A number from 0 to 1 that a file's name alone decides."""
    return int.from_bytes(hashlib.sha256(f"{file.parent.name}/{file.name}".encode()).digest()[:4], "big") / 2**32
