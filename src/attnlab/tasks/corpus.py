"""The Python standard library's own source as a corpus: real text that is on every machine."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

_EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "_bundled"}
_SHARES = {"test": 0.1, "valid": 0.2}  # upper ends of the hash range; the rest trains


@dataclass(frozen=True)
class Corpus:
    """Bytes of the three splits, and what identifies them.

    Args:
        splits: "train", "valid" and "test" to their bytes; files follow one another in sorted order.
        num_files: files read.
        sha256: hash over the paths and contents of all files read.
    """

    splits: dict[str, UInt8[Tensor, "_"]]
    num_files: int
    sha256: str


def source_files(root: Path) -> Iterator[Path]:
    """Python files below ``root`` in sorted order, without installed packages, tests and generated files."""
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _EXCLUDED]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    yield from sorted(found, key=lambda path: path.relative_to(root).as_posix())


def split_of(name: str) -> str:
    """The split that a file belongs to, by a hash of its path: the same on every machine."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return next((split for split, end in _SHARES.items() if place < end), "train")


@lru_cache(maxsize=4)
def load_corpus(max_bytes: int, root: str | None = None) -> Corpus:
    """Files in sorted order until ``max_bytes`` are read; the one that passes the limit is left out.

    Args:
        max_bytes: of all splits together.
        root: folder to read; by default that of the running Python's standard library.

    Raises:
        ValueError: if a split stays empty.
    """
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    pieces: dict[str, list[bytes]] = {"train": [], "valid": [], "test": []}
    digest, size, count = hashlib.sha256(), 0, 0
    for path in source_files(folder):
        text = path.read_bytes()
        if size + len(text) > max_bytes:
            break
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
        pieces[split_of(name)].append(text)
        size, count = size + len(text), count + 1
    if empty := [name for name, parts in pieces.items() if not any(parts)]:
        raise ValueError(f"max_bytes: {max_bytes} bytes of {folder} leave {', '.join(empty)} empty; raise it")
    splits = {name: torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8) for name, parts in pieces.items()}
    return Corpus(splits, count, digest.hexdigest())
