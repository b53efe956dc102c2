"""Suites from TOML files: those of the package by name, others by path."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from attnlab.compare.suites.spec import MixerChoice, Suite, TaskChoice, Timing, check_keys
from attnlab.core.errors import UnknownNameError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def list_suites() -> list[str]:
    """Names of the package's suites."""
    folder = files("attnlab.compare.suites")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_suite(name_or_path: str | os.PathLike[str]) -> Suite:
    """Read a suite of the package by its name ("quick"), or a TOML file by its path.

    Raises:
        UnknownNameError: neither a suite nor a file has this name, or the file names an unknown key, mixer, task or option.
        ValueError: the file is not TOML, or a value is out of range.
        TypeError: a value is of the wrong type.
    """
    given = os.fspath(name_or_path)
    known = list_suites()
    if given in known:
        text, where = files("attnlab.compare.suites").joinpath(f"{given}.toml").read_text(encoding="utf-8"), f"suite {given}"
    elif Path(given).is_file():
        text, where = Path(given).read_text(encoding="utf-8"), given
    else:
        hint = nearest(given, known) or f"; known: {', '.join(known)}, or the path of a .toml file"
        raise UnknownNameError(f"unknown suite {given!r}{hint}")
    try:
        return parse_suite(tomllib.loads(text), Path(given).stem)
    except UnknownNameError as error:
        raise UnknownNameError(f"{where}: {error}") from None
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None


def parse_suite(data: Mapping[str, Any], name: str) -> Suite:
    """The suite that a TOML document describes; ``name`` is its name unless it gives one."""
    check_keys("suite", data, [field.name for field in fields(Suite)])
    for required in ("tasks", "mixers"):
        if not isinstance(data.get(required), list):
            raise ValueError(f"{required}: expected a list, got {data.get(required)!r}")
    rest = {key: value for key, value in data.items() if key not in ("tasks", "mixers", "timing")}
    if "learning_rates" in rest:
        rest["learning_rates"] = numbers("learning_rates", rest["learning_rates"])
    for key, kind in (("seeds", int), ("workers", int), ("control", bool), ("summary", str), ("name", str), ("match", str)):
        if key in rest and type(rest[key]) is not kind:
            raise TypeError(f"{key}: expected {kind.__name__}, got {rest[key]!r}")
    return Suite(
        **{"name": name, **rest},
        tasks=tuple(_entry(TaskChoice, "tasks", entry) for entry in data["tasks"]),
        mixers=tuple(_entry(MixerChoice, "mixers", entry) for entry in data["mixers"]),
        timing=None if "timing" not in data else _timing(data["timing"]),
    )


def _entry(kind: type[Any], where: str, entry: Any) -> Any:
    if isinstance(entry, str):
        return kind(entry)
    if not isinstance(entry, dict) or "name" not in entry:
        raise TypeError(f"{where}: expected a name or a table with a name, got {entry!r}")
    check_keys(f"{where}, {entry['name']}", entry, [field.name for field in fields(kind)])
    for field in fields(kind):
        wanted = str if field.name in ("name", "label") else dict
        if field.name in entry and not isinstance(entry[field.name], wanted):
            raise TypeError(f"{where}, {entry['name']}: {field.name}: expected {wanted.__name__}, got {entry[field.name]!r}")
    return kind(**entry)


def _timing(table: Any) -> Timing:
    if not isinstance(table, dict):
        raise TypeError(f"timing: expected a table, got {table!r}")
    check_keys("timing", table, [field.name for field in fields(Timing)])
    values = dict(table)
    for key in ("lengths", "memory_lengths"):
        if key in values:
            values[key] = tuple(int(number) for number in numbers(f"timing {key}", values[key]))
    for key in ("dim", "num_heads", "batch_size", "pairs", "threads"):
        if key in values and type(values[key]) is not int:
            raise TypeError(f"timing {key}: expected an integer, got {values[key]!r}")
    if "lengths" in values and "memory_lengths" not in values:
        kept = [length for length in Timing.memory_lengths if length in values["lengths"]]
        values["memory_lengths"] = tuple(kept or values["lengths"][-1:])
    return Timing(**values)


def numbers(where: str, values: Any) -> tuple[float, ...]:
    """A list of numbers as a tuple; TypeError for anything else."""
    if not isinstance(values, list | tuple) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{where}: expected a list of numbers, got {values!r}")
    return tuple(float(value) for value in values)


def select(
    suite: Suite,
    *,
    mixers: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    seeds: int | None = None,
    learning_rates: Sequence[float] | None = None,
    match: str | None = None,
    timing: bool = True,
    workers: int | None = None,
) -> Suite:
    """A suite with some of it exchanged, as the command line's options do.

    Args:
        suite: what is changed.
        mixers: labels of the suite's entries, or names of registered mixers, which then have their default options.
        tasks: labels of the suite's entries, or names of registered tasks, which then have their defaults.
        seeds: number of seeds.
        learning_rates: rates of the sweep.
        match: "parameters" or "compute".
        timing: False leaves timing out.
        workers: processes that train.
    """
    changes: dict[str, Any] = {}
    if mixers is not None:
        have = {mixer.label: mixer for mixer in suite.mixers}
        changes["mixers"] = tuple(have.get(name) or MixerChoice(name) for name in mixers)
        kept = {mixer.label for mixer in changes["mixers"]}
        changes["tasks"] = tuple(_only(task, kept) for task in suite.tasks)
    if tasks is not None:
        own = {task.label: task for task in changes.get("tasks", suite.tasks)}
        changes["tasks"] = tuple(own.get(name) or TaskChoice(name) for name in tasks)
    if seeds is not None:
        changes["seeds"] = seeds
    if workers is not None:
        changes["workers"] = workers
    if match is not None:
        changes["match"] = match
    if learning_rates is not None:
        changes["learning_rates"] = tuple(learning_rates)
    if not timing:
        changes["timing"] = None
    return replace(suite, **changes)


def _only(task: TaskChoice, labels: set[str]) -> TaskChoice:
    return replace(task, mixer_options={label: own for label, own in task.mixer_options.items() if label in labels})
