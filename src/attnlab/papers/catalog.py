"""The catalogue of papers, read once from the package's ``papers.toml``: bibliographic facts, no prose."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from attnlab.core.errors import UnknownNameError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Paper:
    """A published paper.

    Attributes:
        index: its number in the catalogue, from 0.
        slug: its short name, ``kebab-case``; what a registration gives as ``paper=``.
        title: as printed.
        year: of the preprint, or of publication where there is no preprint.
        arxiv: the identifier without prefix or version (``"2312.08874"``), or None.
        code: where the authors point for their code (a page that need not hold any), or None.
        kind: what the paper contributes: "mixer", "block", "modifier", "training", "survey", ...
        family: the group of mechanisms that it belongs to: "linear", "local", "cross", ...
        reconstruction: True where the paper could not be read in full, so that what is built is no more than a
            reconstruction, and no equivalence with the paper is claimed.
        recorded: True where vectors of the authors' code were recorded to compare with.
    """

    index: int
    slug: str
    title: str
    year: int
    arxiv: str | None = None
    code: str | None = None
    kind: str = ""
    family: str = ""
    reconstruction: bool = False
    recorded: bool = False


@cache
def papers() -> tuple[Paper, ...]:
    """All papers, by index; read from the package data on the first call."""
    text = files("attnlab.papers").joinpath("papers.toml").read_text(encoding="utf-8")
    return tuple(Paper(**row) for row in tomllib.loads(text)["paper"])


def paper(slug_or_index: str | int) -> Paper:
    """The paper with this slug or index.

    Raises:
        UnknownNameError: no paper has it; names the nearest slugs, or the range of indices.
    """
    known = papers()
    if isinstance(slug_or_index, int):
        if not 0 <= slug_or_index < len(known):
            raise UnknownNameError(f"paper index: expected 0 to {len(known) - 1}, got {slug_or_index}")
        return known[slug_or_index]
    by_slug = {entry.slug: entry for entry in known}
    if slug_or_index not in by_slug:
        hint = nearest(slug_or_index, by_slug) or "; attnlab.papers.papers() lists them"
        raise UnknownNameError(f"unknown paper {slug_or_index!r}{hint}")
    return by_slug[slug_or_index]


def citation(paper: Paper) -> str:
    """A BibTeX ``@misc`` entry of the facts that the catalogue has: title, year, arXiv identifier or else the code's address."""
    fields = {"title": f"{{{_escape(paper.title)}}}", "year": str(paper.year)}
    if paper.arxiv is not None:
        fields |= {"eprint": paper.arxiv, "archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{paper.arxiv}"}
    elif paper.code is not None:
        fields["url"] = paper.code
    body = "".join(f"  {key} = {{{value}}},\n" for key, value in fields.items())
    return f"@misc{{{paper.slug},\n{body}}}\n"


def _escape(text: str) -> str:
    """``text`` with the characters that LaTeX takes as commands escaped."""
    return "".join({"^": r"\^{}", "~": r"\~{}"}.get(char, "\\" + char if char in "&%$#_" else char) for char in text)
