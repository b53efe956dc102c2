"""A cell of the grid: what is to be computed, under a key that is the same on every machine and in every run."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import attnlab.core

Kind = Literal["train", "test", "matrix", "rounding", "timing"]
Role = Literal["sweep", "seed", "test", "matrix", "control", "rounding", "timing"]

# The rooms whose code decides the numbers of a cell; a change in the report or the command line runs nothing again.
ROOMS = ("core", "ops", "positions", "mixers", "channel_mixers", "models", "tasks", "training")


@dataclass(frozen=True)
class Cell:
    """One unit of work.

    Args:
        kind: "train" (one training run, scored on the validation split), "test" (the test split by a trained model),
            "matrix" (what a trained model attends to on one example),
            "rounding" (one step of softmax through two backends), or "timing" (one mixer's gate, times and memory).
        spec: everything that determines the result, as JSON can hold it.
    """

    kind: Kind
    spec: Mapping[str, Any]

    @property
    def key(self) -> str:
        """SHA-256 in hex of kind and spec in canonical JSON: the order of keys does not matter, every value does."""
        return hashlib.sha256(canonical({"kind": self.kind, **self.spec}).encode()).hexdigest()

    @property
    def label(self) -> str:
        """What this is, for progress bars and messages."""
        names = [self.kind, self.spec["mixer"]["name"]]
        if "task" in self.spec:
            names.append("on " + self.spec["task"]["name"])
        if "learning_rate" in self.spec:
            names.append(f"lr {self.spec['learning_rate']:g}, seed {self.spec['seed']}")
        return " ".join(names)


@dataclass(frozen=True)
class Member:
    """A cell in its place in a run.

    Args:
        role: what the run wants it for; one cell may have several roles.
        task: label of the suite's task, empty for timing.
        mixer: label of the suite's mixer.
        cell: the work.
    """

    role: Role
    task: str
    mixer: str
    cell: Cell


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces; TypeError for what JSON cannot hold, ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@functools.cache
def code_version() -> str:
    """Twelve digits of a hash over torch's version and the source of the rooms that decide a result."""
    root = Path(attnlab.core.__path__[0]).parent
    digest = hashlib.sha256(torch.__version__.encode())
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
