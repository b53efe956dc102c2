"""One generic registry for mixers, positions, models, tasks and the rest; entries are found by importing lazily."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from attnlab.core.errors import UnknownNameError, nearest
from attnlab.core.info import Info, MixerInfo, Supports, first_line, read_options
from attnlab.core.plugins import is_file_reference, load_object

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered factory (a class or a function) with its `Info`."""

    name: str
    factory: Callable[..., T]
    info: Info


class Registry(Generic[T]):
    """Names to factories.

    The modules of ``package`` are imported when the registry is first asked. One that fails to import (a broken optional
    dependency, say) is kept in `broken` and named in the error of a failed lookup; it never breaks the others. Installed packages
    add entries through an entry point of the group ``package``, which names a module or a class that registers itself; a class
    in a file is found as ``path.py:Class``.

    Args:
        kind: what the entries are, in the singular; used in messages.
        package: the package whose modules register entries.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self.broken: dict[str, Exception] = {}
        self._entries: dict[str, Entry[T]] = {}
        self._files: dict[str, Entry[T]] = {}
        self._discovered = False
        _REGISTRIES[kind] = self

    def register(
        self,
        name: str,
        *,
        family: str = "",
        paper: str | None = None,
        partial: bool = False,
        also: tuple[str, ...] = (),
        supports: Supports | None = None,
        example: dict[str, Any] | None = None,
    ) -> Callable[[F], F]:
        """Decorator that enters a class or function under ``name``; ValueError if the name is taken. Fields as in `Info`."""

        def enter(factory: F) -> F:
            known = self._entries.get(name)
            if known is not None and known.factory.__qualname__ != factory.__qualname__:
                raise ValueError(f"{self.kind} {name!r} is registered already, by {known.factory.__module__}")
            common = (name, self.kind, first_line(factory.__doc__), family, paper, read_options(factory))
            if supports is None:
                info = Info(*common, partial=partial, also=also)
            else:
                info = MixerInfo(*common, supports, tuple((example or {}).items()), partial=partial, also=also)
            self._entries[name] = Entry(name, factory, info)
            if isinstance(factory, type):
                factory.info = info  # type: ignore[attr-defined]
            return factory

        return enter

    def get(self, name: str) -> Entry[T]:
        """The entry called ``name``, or of the class in a file; UnknownNameError names the nearest ones."""
        if is_file_reference(name):
            return self._from_file(name)
        if name not in self._entries:
            self._discover()
        if name not in self._entries:
            hint = nearest(name, self._entries) or f"; known: {', '.join(sorted(self._entries))}"
            lost = "".join(f" ({module} could not be imported: {error})" for module, error in self.broken.items())
            raise UnknownNameError(f"unknown {self.kind} {name!r}{hint}{lost}")
        return self._entries[name]

    def _from_file(self, reference: str) -> Entry[T]:
        if reference not in self._files:
            factory = load_object(reference)
            entry = next((entry for entry in self._entries.values() if entry.factory is factory), None)
            if entry is None:
                raise ValueError(
                    f"{reference!r} is not registered as a {self.kind}: expected a decorator with .register(name, ...)"
                )
            self._files[reference] = entry
        return self._files[reference]

    def create(self, name: str, /, **options: Any) -> T:
        """Build the entry ``name``; an option that its constructor does not have raises UnknownNameError."""
        entry = self.get(name)
        known = [option.name for option in entry.info.options]
        for option in options:
            if option not in known:
                hint = nearest(option, known) or f"; options: {', '.join(known)}"
                raise UnknownNameError(f"{self.kind} {name!r} has no option {option!r}{hint}")
        return entry.factory(**options)

    def info(self, name: str) -> Info:
        """The `Info` of the entry ``name``."""
        return self.get(name).info

    def names(self, pattern: str = "*", *, family: str | None = None, **supports: object) -> list[str]:
        """Sorted names that match a shell pattern, a family, and what `Supports.matches` takes."""
        self._discover()
        found = []
        for name, entry in self._entries.items():
            if not fnmatch.fnmatchcase(name, pattern) or (family is not None and entry.info.family != family):
                continue
            if supports and not (isinstance(entry.info, MixerInfo) and entry.info.supports.matches(**supports)):
                continue
            found.append(name)
        return sorted(found)

    def entries(self) -> list[Entry[T]]:
        """All entries, by name."""
        return [self.get(name) for name in self.names()]

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=lambda name: None):
            try:
                importlib.import_module(module.name)
            except Exception as error:
                self.broken[module.name] = error
        for point in importlib.metadata.entry_points(group=self.package):
            try:
                point.load()
            except Exception as error:
                self.broken[point.value] = error


_REGISTRIES: dict[str, Registry[Any]] = {}
_ROOMS = (
    "core.catalog",
    "ops.executions",
    "positions",
    "modifiers",
    "channel_mixers",
    "reducers",
    "models",
    "objectives",
    "tasks",
    "parallel",
)


def all_registries() -> dict[str, Registry[Any]]:
    """Every registry by its kind; the rooms that have one are imported."""
    for room in _ROOMS:
        importlib.import_module(f"attnlab.{room}")
    return dict(_REGISTRIES)
