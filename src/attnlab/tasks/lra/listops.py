"""ListOps as a task."""

from __future__ import annotations

import csv
import hashlib
import os
import random
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from attnlab.tasks.contract import Batch, Budget, Split
from attnlab.tasks.lra.fixed import FixedSplits, Part, pad_right
from attnlab.tasks.lra.listops_trees import FIRST_OPERATOR, VOCAB_SIZE, ListOpsSettings, accepted_trees, read_source
from attnlab.tasks.lra.shards import Arrays, build_shards, piece_sizes
from attnlab.tasks.registry import tasks

SHARD = 2000
"""Trees a piece; each piece has a stream of its own."""
REPEATS = 10_000
"""Trees in a row that may have been drawn before."""
FILES = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
"""The published files."""

Example = tuple[bytes, int]


def listops_shard(number: int, size: int, *, settings: ListOpsSettings, seed: int) -> Arrays:
    """``size`` different trees of the stream ``random.Random(seed + number * 2**32)``: ids end to end, lengths, values."""
    found: dict[bytes, int] = {}
    repeats = 0
    for ids, value in accepted_trees(random.Random(seed + (number << 32)), settings):
        repeats = repeats + 1 if bytes(ids) in found else 0
        found.setdefault(bytes(ids), value)
        if len(found) == size:
            break
        if repeats > REPEATS:
            raise ValueError(f"train_examples, eval_examples: expected fewer, there are about {len(found)} such trees")
    return {
        "ids": np.frombuffer(b"".join(found), dtype=np.uint8),
        "lengths": np.array([len(ids) for ids in found], dtype=np.int64),
        "values": np.array(list(found.values()), dtype=np.uint8),
    }


@tasks.register("listops", family="long_range", paper="long-range-arena")
class ListOps(FixedSplits):
    r"""ListOps: what is the value of ``[MAX 4 [SM 7 8 ] 2 ]``? (Nangia and Bowman 2018; Tay et al. 2020.)

    Operators are minimum, maximum, median and sum modulo 10; the value is one of ten classes. Trees are drawn from
    ``random.Random(seed)`` as `attnlab.tasks.lra.listops_trees.draw_tree` says and kept if their number of tokens is between
    the bounds and they were not drawn before; the first train, the next validate, the last test. (The published generator takes
    them in the order of a Python set, which is no order to reproduce.) The defaults are learnt within seconds; published are
    ``max_depth=10, max_args=10, min_length=500, max_length=2000, train_examples=96000, eval_examples=2000``.

    Accuracy is to be read beside its two baselines: at the published sizes the root's operator alone gives about 37 %.

    Args:
        max_depth: depth at which there are only digits.
        max_args: most arguments of an operator.
        min_length: trees have more tokens.
        max_length: trees have fewer tokens; inputs are padded to this length.
        train_examples: trees to train on.
        eval_examples: trees in each evaluation split.
        seed: of all of them.
        path: a folder: with the published ``basic_train.tsv``, ``basic_val.tsv`` and ``basic_test.tsv`` these are read and
            sizes and seed are of no account; otherwise trees are kept there as they are made, and found again.
        processes: that make trees.

    Raises:
        ValueError: for sizes that do not fit, more trees than there are, or a folder with trees of other settings.
    """

    small: ClassVar[Mapping[str, Any]] = {"train_examples": 40, "eval_examples": 20}
    num_classes = 10

    def __init__(
        self,
        max_depth: int = 4,
        max_args: int = 5,
        min_length: int = 5,
        max_length: int = 60,
        *,
        train_examples: int = 8000,
        eval_examples: int = 500,
        seed: int = 0,
        path: str | os.PathLike[str] | None = None,
        processes: int = 1,
    ) -> None:
        if train_examples < 1 or eval_examples < 1 or seed < 0:
            raise ValueError(
                "train_examples, eval_examples, seed: expected positive integers and a non-negative one, "
                f"got {train_examples}, {eval_examples} and {seed}"
            )
        self.settings = ListOpsSettings(max_depth, max_args, min_length, max_length)
        self.max_length, self.seed = max_length, seed
        folder = None if path is None else Path(path)
        if folder is not None and all((folder / name).exists() for name in FILES.values()):
            self._examples = {part: _read(folder / name) for part, name in FILES.items()}
        else:
            self._examples = self._generate(train_examples, eval_examples, folder, processes)
        self._labels = {part: torch.tensor([value for _, value in found]) for part, found in self._examples.items()}

    def _generate(self, train: int, held_out: int, folder: Path | None, processes: int) -> dict[str, list[Example]]:
        make = partial(listops_shard, settings=self.settings, seed=self.seed)
        facts = {"task": "listops", "seed": self.seed, "shard": SHARD, **asdict(self.settings)}
        wanted, pieces = train + 2 * held_out, 0
        found: dict[bytes, int] = {}
        while (missing := wanted - len(found)) > 0:  # pieces may repeat trees of one another
            if pieces > 50 + 2 * wanted // SHARD:
                raise ValueError(f"train_examples, eval_examples: expected fewer, there are about {len(found)} such trees")
            # several pieces are always whole, so that the data are the same whether they are kept or not
            sizes = piece_sizes(missing, SHARD, kept=folder is not None or wanted > SHARD)
            for arrays in build_shards(make, sizes, folder=folder, facts=facts, processes=processes, first=pieces):
                ends = arrays["lengths"].cumsum()
                text = arrays["ids"].tobytes()
                for start, end, value in zip(ends - arrays["lengths"], ends, arrays["values"], strict=True):
                    found.setdefault(text[start:end], int(value))
            pieces += len(sizes)
        examples = list(found.items())
        valid, test = train + held_out, wanted
        return {"train": examples[:train], "valid": examples[train:valid], "test": examples[valid:test]}

    @property
    def model_options(self) -> Mapping[str, Any]:
        """An encoder with learned positions over real tokens."""
        return {"num_classes": 10, "vocab_size": VOCAB_SIZE, "max_length": self.max_length}

    @property
    def default_budget(self) -> Budget:
        """About 10 seconds on one core at the default sizes."""
        return Budget(steps=300, batch_size=32, learning_rates=(0.003, 0.006), parameters=60_000, depth=2, num_heads=4)

    def labels(self, part: Part) -> Int[Tensor, "n"]:
        """The trees' values."""
        return self._labels[part]

    def batch(self, part: Part, rows: Int[Tensor, "b"]) -> Batch:
        """Trees and their values."""
        ids, mask = pad_right([self._examples[part][row][0] for row in rows.tolist()], self.max_length)
        return Batch(ids, self._labels[part][rows], mask)

    def baselines(self, split: Split = "valid") -> dict[str, float]:
        """Accuracy of the training trees' most frequent value, and of the most frequent one for the root's operator."""
        cues: dict[Part, Tensor] = {
            part: torch.tensor([max(0, ids[0] - FIRST_OPERATOR + 1) for ids, _ in self._examples[part]])
            for part in ("train", split)
        }
        return {"majority": self.best_guess(split), "root_operator": self.best_guess(split, cues)}

    def fingerprint(self) -> str:
        """Hash of all trees and values in order."""
        digest = hashlib.sha256(f"listops {self.max_length}".encode())
        for part, found in self._examples.items():
            digest.update(f"{part} {len(found)}".encode())
            for ids, value in found:
                digest.update(ids + bytes([255, value]))
        return digest.hexdigest()


def _read(file: Path) -> list[Example]:
    """Trees and values of a published file, columns Source and Target."""
    with file.open(encoding="utf-8", newline="") as stream:
        rows = csv.reader(stream, delimiter="\t")
        header = next(rows, None)
        if header != ["Source", "Target"]:
            raise ValueError(f"path: expected the columns Source and Target in {file}, got {header}")
        return [(bytes(read_source(source)), int(target)) for source, target in rows]
