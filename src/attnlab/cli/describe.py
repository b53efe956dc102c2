"""What the registries know of a thing, as plain data and as short text: for the commands, their JSON and the documentation."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from attnlab.cli.docstrings import describe_arguments, parse
from attnlab.cli.latex import readable_text
from attnlab.core.errors import UnknownNameError, nearest
from attnlab.core.info import MixerInfo, Option, Supports, first_line
from attnlab.core.registry import Entry, Registry, all_registries
from attnlab.papers.catalog import Paper, citation, paper
from attnlab.papers.evidence import TIERS, Proof, load

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_SAMPLE_SIZES = {"dim": 64, "num_heads": 4, "head_dim": 16, "depth": 2, "vocab_size": 256, "max_length": 512, "num_classes": 10}
_DEPENDENT = ("vocab_size", "max_length")  # optional by signature, but needed by the other defaults


def registry(kind: str) -> Registry[Any]:
    """The registry of a kind; UnknownNameError says which kinds there are."""
    if kind == "mixer":
        from attnlab.core.catalog import mixers

        return mixers  # without importing the other rooms
    known = all_registries()
    if kind not in known:
        raise UnknownNameError(f"kind: expected one of {', '.join(known)}, got {kind!r}{nearest(kind, known)}")
    return known[kind]


def find(name: str, kind: str | None = None) -> Entry[Any]:
    """The entry called ``name`` of a kind, or of the first kind that has one, mixers first."""
    if kind is not None:
        return registry(kind).get(name)
    if name in (mixers := registry("mixer")).names():
        return mixers.get(name)
    registries = all_registries()
    for candidates in registries.values():
        if name in candidates.names():
            return candidates.get(name)
    known = {entry: None for candidates in registries.values() for entry in candidates.names()}
    raise UnknownNameError(f"nothing is called {name!r}{nearest(name, known) or '; `attnlab list` lists the mixers'}")


def cost_text(exponent: float) -> str:
    """The growth of time and memory with the number of tokens: "n", "n²", "n^1.5"."""
    if exponent == 1:
        return "n"
    if exponent == int(exponent):
        return "n" + str(int(exponent)).translate(_SUPERSCRIPTS)
    return f"n^{exponent:g}"


def headline(entry: Entry[Any]) -> str:
    """What the thing is in a line of plain text: of a mixer, which has a file of its own, the first line of that file."""
    module = sys.modules.get(entry.factory.__module__)
    text = entry.info.summary
    if entry.info.kind == "mixer" and module is not None:
        text = first_line(module.__doc__) or text
    return " ".join(piece for piece, _ in readable_text(text)).replace("`", "")


def default_text(option: Option) -> str:
    """The default as it would be written; "required" where there is none."""
    return "required" if option.default is ... else repr(option.default)


def supports_data(supports: Supports) -> dict[str, Any]:
    """Every promise by name."""
    data = {field.name: getattr(supports, field.name) for field in fields(supports)}
    return data | {"grid": sorted(supports.grid)}


def listing_data(entry: Entry[Any]) -> dict[str, Any]:
    """Name, kind, family, paper, headline, summary, options and, of a mixer, its promises."""
    info = entry.info
    data: dict[str, Any] = {
        "name": info.name,
        "kind": info.kind,
        "family": info.family,
        "paper": info.paper,
        "also": list(info.also),
        "headline": headline(entry),
        "summary": info.summary,
        "options": [{"name": o.name, "type": o.annotation, "default": default_text(o)} for o in info.options],
    }
    if isinstance(info, MixerInfo):
        data |= {"supports": supports_data(info.supports)}
    return data


def proofs(kind: str, name: str) -> dict[str, Proof]:
    """The tiers that hold for a registered thing, with their tests."""
    found: Mapping[str, Proof] = load().get(f"{kind}:{name}", {})
    return {tier: found[tier] for tier in TIERS if tier in found and found[tier].holds}


def paper_data(subject: Paper) -> dict[str, Any]:
    """The facts of a paper, with its BibTeX entry."""
    return {field.name: getattr(subject, field.name) for field in fields(subject)} | {"bibtex": citation(subject)}


def entry_data(entry: Entry[Any]) -> dict[str, Any]:
    """Everything about an entry: `listing_data`, its docstring in parts, its paper, the tiers that hold, an example."""
    doc, said = parse(inspect.getdoc(entry.factory)), describe_arguments(entry.factory)
    info = listing_data(entry)
    for option in info["options"]:
        option["description"] = said.get(option["name"], "")
    found = proofs(entry.info.kind, entry.name)
    return info | {
        "description": "\n\n".join([doc.summary, *doc.body]),
        "notes": dict(doc.notes),
        "errors": dict(doc.errors),
        "paper": paper_data(paper(entry.info.paper)) if entry.info.paper else None,
        "tiers": {tier: {"passed": proof.passed, "tests": list(proof.tests)} for tier, proof in found.items()},
        "example": example(entry),
    }


def example(entry: Entry[Any]) -> str:
    """A line of Python that builds a small one; ``...`` stands for what only the user can know."""
    info = entry.info
    required = [o.name for o in info.options if o.default is ... or (o.name in _DEPENDENT and o.default is None)]
    needed: dict[str, Any] = {name: _SAMPLE_SIZES.get(name, ...) for name in required}
    if isinstance(info, MixerInfo):
        defaults = {option.name: option.default for option in info.options}
        heads = {"num_heads": 4} if defaults.get("num_heads", 1) != 1 else {}  # 1: a mechanism without heads
        causal = {"causal": True} if info.supports.causal == "optional" else {}
        needed = {"dim": 64} | heads | causal | dict(info.example)
        return f"attnlab.create_mixer({_call(entry.name, needed)})"
    if info.kind == "modifier":
        return f'{verb(info.kind)}(..., "{entry.name}")'
    return f"{verb(info.kind)}({_call(entry.name, needed)})"


def verb(kind: str) -> str:
    """The function, with its module, that makes an entry of a kind do its work."""
    own = {"modifier": "apply_modifier", "execution": "executions.execute"}
    return f"{registry(kind).package}.{own.get(kind, f'create_{kind}')}"


def _call(name: str, options: Mapping[str, Any]) -> str:
    said = [f"{key}=..." if value is ... else f"{key}={value!r}" for key, value in options.items()]
    return ", ".join([f'"{name}"', *said])
