"""What a comparison consists of: tasks, mixers, seeds, learning rates, budgets, and the lengths to time at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import torch

from attnlab.core.catalog import mixers as mixer_registry
from attnlab.core.errors import UnknownNameError, nearest
from attnlab.core.registry import Registry
from attnlab.tasks import Budget
from attnlab.tasks.contract import Match
from attnlab.tasks.registry import tasks as task_registry

REFERENCE = "softmax"
"""The mixer against which others are timed and compared, and which the control runs twice."""


@dataclass(frozen=True)
class MixerChoice:
    """A mixer of a suite.

    Args:
        name: as it is registered, or ``path.py:Class`` of a registered class in a file.
        options: its own options, as JSON can hold them.
        label: what the report calls it; by default its registered name. Two entries of one mixer need two labels.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        check_options(mixer_registry, self.name, self.options)
        if not self.label:
            object.__setattr__(self, "label", mixer_registry.get(self.name).name)


@dataclass(frozen=True)
class TaskChoice:
    """A task of a suite.

    Args:
        name: as it is registered.
        options: its own options.
        budget: fields of `attnlab.tasks.Budget` that differ from the task's default.
        mixer_options: options that a mixer takes on this task alone, by label; they are laid over its own.
        label: what the report calls it; by default the name. Two entries of one task need two labels.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    mixer_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name)
        check_options(task_registry, self.name, self.options)
        check_keys(f"budget of task {self.name!r}", self.budget, [f.name for f in fields(Budget)])


@dataclass(frozen=True)
class Timing:
    """How layers are timed and weighed.

    Args:
        lengths: tokens, rising.
        memory_lengths: those of them at which peak memory is measured too.
        dim: width of the layer.
        num_heads: its heads.
        batch_size: sequences at once.
        seconds: time spent on one mixer at one length in one direction, about.
        pairs: least number of pairs (mixer, softmax) measured all the same.
        threads: torch's threads meanwhile. One is steady on a machine that does other work too: with more, each operation waits
            for the slowest of them, and mechanisms of many small operations look slower than they are.
        device: "cpu", or "cuda", whose work is waited for before the clock is read.
    """

    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    memory_lengths: tuple[int, ...] = (1024, 4096)
    dim: int = 128
    num_heads: int = 4
    batch_size: int = 1
    seconds: float = 0.4
    pairs: int = 3
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"timing device: expected 'cpu' or 'cuda', got {self.device!r}")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"timing device: expected 'cpu', as this machine has no CUDA device, got {self.device!r}")
        if any(length < 1 for length in self.lengths) or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"timing lengths: expected positive integers in rising order, got {list(self.lengths)}")
        if not set(self.memory_lengths) <= set(self.lengths):
            raise ValueError(f"timing memory_lengths: expected some of {list(self.lengths)}, got {list(self.memory_lengths)}")
        for name in ("dim", "num_heads", "batch_size", "pairs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"timing {name}: expected a positive integer, got {getattr(self, name)}")
        if self.dim % self.num_heads:
            raise ValueError(f"timing dim: expected a multiple of num_heads={self.num_heads}, got {self.dim}")


@dataclass(frozen=True)
class Suite:
    """A comparison.

    Args:
        name: names its output folder.
        tasks: what is learnt; may be empty where ``timing`` is given.
        mixers: what is compared.
        summary: one sentence.
        seeds: runs of each mixer on each task at its best rate; seeds count from 0.
        learning_rates: rates of the sweep at seed 0 on every task; None takes each task's own.
        match: what models have as much of on every task, "parameters" or "compute"; None takes each task's own.
        timing: None measures no speed.
        control: train softmax through a second backend as well, which must tie.
        workers: processes that train, one thread each, no more than there are cores; 0 trains in the calling process.

    Raises:
        ValueError: if something is empty, repeated or out of range.
    """

    name: str
    tasks: tuple[TaskChoice, ...]
    mixers: tuple[MixerChoice, ...]
    summary: str = ""
    seeds: int = 2
    learning_rates: tuple[float, ...] | None = None
    match: str | None = None
    timing: Timing | None = None
    control: bool = True
    workers: int = 0

    def __post_init__(self) -> None:
        for what, names in (("tasks", [t.label for t in self.tasks]), ("mixers", [m.label for m in self.mixers])):
            if not names and not (what == "tasks" and self.timing is not None):
                raise ValueError(f"suite {self.name!r}: {what}: expected at least one")
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(
                    f"suite {self.name!r}: {what}: {', '.join(repeated)} more than once; give each entry a label of its own"
                )
        for what, number, least in (("seeds", self.seeds, 1), ("workers", self.workers, 0)):
            if number < least:
                raise ValueError(f"suite {self.name!r}: {what}: expected at least {least}, got {number}")
        if self.learning_rates is not None and (not self.learning_rates or min(self.learning_rates) <= 0):
            raise ValueError(f"suite {self.name!r}: learning_rates: expected positive numbers, got {list(self.learning_rates)}")
        if self.match not in (None, *get_args(Match)):
            raise ValueError(f"suite {self.name!r}: match: expected one of {get_args(Match)}, got {self.match!r}")
        labels = [mixer.label for mixer in self.mixers]
        for task in self.tasks:
            check_keys(f"mixer_options of task {task.label!r}", task.mixer_options, labels)
            for mixer in self.mixers:
                check_options(mixer_registry, mixer.name, task.mixer_options.get(mixer.label, {}))


def check_options(registry: Registry[Any], name: str, options: Mapping[str, Any]) -> None:
    """UnknownNameError, with the nearest names, unless ``name`` is registered and has these options."""
    known = [option.name for option in registry.info(name).options]
    for option in options:
        if option not in known:
            raise UnknownNameError(f"{registry.kind} {name!r} has no option {option!r}{nearest(option, known)}")


def check_keys(where: str, found: Mapping[str, Any], known: list[str]) -> None:
    """UnknownNameError, with the nearest names, for a key that is not known."""
    for key in found:
        if key not in known:
            hint = nearest(key, known) or f"; known: {', '.join(known)}"
            raise UnknownNameError(f"{where}: unknown key {key!r}{hint}")
