"""Docstrings as data: summary, body, arguments, notes. The terminal and the documentation read them the same way."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Differs from the papers?):[ \t]*\n?(.*)", re.DOTALL)
_ENTRY = re.compile(r"(\*{0,2}[\w., ]+?):\s+(.*)", re.DOTALL)


@dataclass(frozen=True)
class Doc:
    """A docstring in parts.

    Attributes:
        summary: the first paragraph, on one line.
        body: the paragraphs of prose and equations, in order; LaTeX and code marks are left as they are.
        notes: sections that are prose, by title: "Returns", "Differs from the paper", or "Args" where they are those of a base.
        arguments: what is said of each argument or attribute, by name.
        errors: when each error is raised, by the error's name.
    """

    summary: str = ""
    body: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)

    @property
    def differences(self) -> str:
        """How the thing differs from its paper, or an empty string."""
        return next((text for title, text in self.notes.items() if title.startswith("Differs")), "")


def parse(text: str | None) -> Doc:
    """Take a docstring apart; None gives an empty `Doc`."""
    paragraphs = re.split(r"\n[ \t]*\n", inspect.cleandoc(text or ""))
    body: list[str] = []
    notes: dict[str, str] = {}
    arguments: dict[str, str] = {}
    errors: dict[str, str] = {}
    for paragraph in paragraphs[1:]:
        match = _SECTION.fullmatch(paragraph)
        if match is None:
            body.append(paragraph)
            continue
        title, content = match.groups()
        entries = _entries(content)
        if entries and title in ("Args", "Attributes"):
            arguments |= entries
        elif entries and title == "Raises":
            errors |= entries
        else:
            notes[title] = _joined(content)
    return Doc(_joined(paragraphs[0]), tuple(body), notes, arguments, errors)


def describe_arguments(factory: Callable[..., Any]) -> dict[str, str]:
    """What the docstrings of a function, or of a class and its bases, say of each argument; the nearest one counts.

    A function of a kind with common arguments names in ``documented_by`` what describes those.
    """
    sources = factory.__mro__ if isinstance(factory, type) else (factory, *getattr(factory, "documented_by", ()))
    found: dict[str, str] = {}
    for source in sources:
        if source is not object:
            found = dict(parse(source.__doc__).arguments) | found
    return {name: text for name, text in found.items() if not name.startswith("*")}


def _entries(content: str) -> dict[str, str]:
    """``name: text`` rows, indented by four; deeper lines go on with the row above."""
    if not content.startswith("    "):
        return {}
    rows: list[str] = []
    for line in inspect.cleandoc("\n" + content).splitlines():
        if line.startswith(" ") and rows:
            rows[-1] += " " + line.strip()
        else:
            rows.append(line.strip())
    found: dict[str, str] = {}
    for row in rows:
        match = _ENTRY.fullmatch(row)
        if match is not None:
            found |= {name.strip(): _joined(match[2]) for name in match[1].split(",")}
    return found


def _joined(text: str) -> str:
    return " ".join(text.split())
