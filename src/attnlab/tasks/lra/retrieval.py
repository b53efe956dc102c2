"""Byte-level document matching over pairs of papers."""

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

FILES = {"train": "new_aan_pairs.train.tsv", "valid": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
"""The published files, without a header: label, two identifiers, two texts."""
CHARACTERS = 10_000
"""Characters of a text that are looked at."""


@tasks.register("lra_retrieval", family="long_range", paper="long-range-arena")
class DocumentMatching(FixedSplits):
    """Does one paper cite the other? Bytes of pairs from the ACL Anthology Network (Radev et al. 2013; Tay et al. 2020).

    Ids are bytes + 1, 0 pads. The first text is the batch's inputs, the second its context. Lines are found once and read
    when they are asked for.

    Args:
        path: the folder of the published files; by default lra_retrieval in the folder that the variable ATTNLAB_DATA names.
        max_length: bytes of each text that are read, padded to.

    Raises:
        MissingDataError: if the files are not there.
        ValueError: for a size out of range, or a line that is no pair.
    """

    source = "the lra_release archive of github.com/google-research/long-range-arena"
    num_classes = 2
    model = "matching"

    def __init__(self, path: str | os.PathLike[str] | None = None, *, max_length: int = 4000) -> None:
        if max_length < 1:
            raise ValueError(f"max_length: expected a positive integer, got {max_length}")
        folder = find_data("lra_retrieval", path, tuple(FILES.values()), self.source)
        self.max_length = max_length
        self._files = {part: folder / name for part, name in FILES.items()}
        self._digest = hashlib.sha256(f"lra_retrieval {max_length}".encode())
        self._lines: dict[str, list[tuple[int, int]]] = {}
        self._labels: dict[str, Int[Tensor, "n"]] = {}
        for part, file in self._files.items():
            self._lines[part], self._labels[part] = self._index(file)

    def _index(self, file: Path) -> tuple[list[tuple[int, int]], Int[Tensor, "n"]]:
        """Where each line stands and how long it is, and the labels."""
        lines, labels, start = [], [], 0
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                self._digest.update(line)
                parts = line.split(b"\t", 4)
                try:
                    labels.append(int(float(parts[0])))
                except ValueError:
                    labels.append(-1)
                if len(parts) < 5 or labels[-1] not in (0, 1):
                    raise ValueError(
                        f"path: expected label, two identifiers and two texts, label 0 or 1, in {file}, line {number}"
                    )
                lines.append((start, len(line)))
                start += len(line)
        return lines, torch.tensor(labels)

    @property
    def model_options(self) -> Mapping[str, Any]:
        """A matching encoder over bytes."""
        return {"num_classes": 2, "vocab_size": 257, "max_length": self.max_length}

    @property
    def default_budget(self) -> Budget:
        """Hours on two cores; the published one is `attnlab.tasks.lra.published.published_settings`' "retrieval"."""
        return Budget(steps=2000, batch_size=16, learning_rates=(0.001, 0.003), parameters=200_000, depth=2, num_heads=4)

    def labels(self, part: Part) -> Int[Tensor, "n"]:
        """1 for pairs that belong together."""
        return self._labels[part]

    def batch(self, part: Part, rows: Int[Tensor, "b"]) -> Batch:
        """Pairs, read from their file, and labels."""
        pairs = []
        with self._files[part].open("rb") as stream:
            for row in rows.tolist():
                start, size = self._lines[part][row]
                stream.seek(start)
                pairs.append(stream.read(size).rstrip(b"\r\n").split(b"\t", 4)[3:])
        one, two = ([_cut(pair[side]) for pair in pairs] for side in (0, 1))
        ids, mask = pad_right(one, self.max_length, shift=1)
        context, context_mask = pad_right(two, self.max_length, shift=1)
        return Batch(ids, self._labels[part][rows], mask, context, context_mask)

    def fingerprint(self) -> str:
        """Hash of all files, and of how they are cut."""
        return self._digest.hexdigest()


def _cut(text: bytes) -> bytes:
    """The first characters of a text, as bytes again; bytes that are no UTF-8 are characters of their own."""
    return text.decode("utf-8", errors="surrogateescape")[:CHARACTERS].encode("utf-8", errors="surrogateescape")
