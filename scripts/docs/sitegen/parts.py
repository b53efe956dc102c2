"""Pages of what is not a mixer: ops from their modules, positions, channel mixers, models and tasks from their registries."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import Any

import attnlab.ops
from attnlab.cli.describe import default_text, example
from attnlab.cli.docstrings import Doc, describe_arguments, parse
from attnlab.core.registry import Entry
from attnlab.ops.backends import Op


@dataclass(frozen=True)
class Function:
    """A public function with its signature and its documentation."""

    name: str
    signature: str
    doc: Doc


@dataclass(frozen=True)
class OpModule:
    """A package of `attnlab.ops`: what it computes, its public functions, its backends."""

    name: str
    doc: Doc
    functions: tuple[Function, ...]
    backends: tuple[str, ...]


def op_modules() -> list[OpModule]:
    """The packages of `attnlab.ops`, by name."""
    found = []
    for module_info in sorted(pkgutil.iter_modules(attnlab.ops.__path__), key=lambda info: info.name):
        if not module_info.ispkg:
            continue
        module = importlib.import_module(f"attnlab.ops.{module_info.name}")
        public = [getattr(module, name) for name in getattr(module, "__all__", [])]
        functions = tuple(_function(item) for item in public if inspect.isfunction(item))
        backends = tuple(name for item in public if isinstance(item, Op) for name in item.implementations)
        found.append(OpModule(module_info.name, parse(module.__doc__), functions, backends))
    return found


def _function(function: Any) -> Function:
    """Signature as it is written, an argument a line."""
    signature = inspect.signature(function)
    lines, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("    *,")
            starred = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"    {parameter.name}: {parameter.annotation}{default},")
    returns = signature.return_annotation
    return Function(function.__name__, "\n".join([f"{function.__name__}(", *lines, f") -> {returns}"]), parse(function.__doc__))


def entry_part(entry: Entry[Any]) -> dict[str, Any]:
    """What the page of a registry says of one entry."""
    said = describe_arguments(entry.factory)
    options = [(o.name, o.annotation, default_text(o), said.get(o.name, "")) for o in entry.info.options]
    return {
        "name": entry.name,
        "info": entry.info,
        "doc": parse(inspect.getdoc(entry.factory)),
        "options": options,
        "example": example(entry),
    }
