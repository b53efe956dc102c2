"""Entries from outside of the package: classes in a user's file, and what installed packages offer."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = __name__.partition(".")[0]


def is_file_reference(name: str) -> bool:
    """Whether ``name`` is of the form ``path.py:Class``."""
    return name.rpartition(":")[0].endswith(".py")


@functools.cache
def load_object(reference: str) -> Callable[..., Any]:
    """The object called after the colon of ``path.py:Class``; the file is run once in a process.

    Raises:
        ValueError: if the file is not there, cannot be run, or holds no such thing.
    """
    text, _, attribute = reference.rpartition(":")
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"{reference!r}: expected path.py:Class, but there is no file {text!r}")
    module = _run(path, reference)
    found = getattr(module, attribute, None)
    if not callable(found):
        own = (key for key, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__)
        raise ValueError(f"{reference!r}: the file has no class or function {attribute!r}; its classes are {sorted(own)}")
    return found


def _run(path: Path, reference: str) -> Any:
    name = f"{ROOT}_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{reference!r}: expected a Python file, got {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses of the file look for it
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{reference!r}: running the file raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def foreign_source(factory: Callable[..., Any]) -> str | None:
    """SHA-256 in hex of the file that defines ``factory``, where that is not this package; None where it is."""
    if factory.__module__.partition(".")[0] == ROOT:
        return None
    file = inspect.getsourcefile(factory)
    return hashlib.sha256(b"" if file is None else Path(file).read_bytes()).hexdigest()
