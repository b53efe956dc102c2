"""Docstrings as Markdown: what is prose there is escaped, what is code or an equation is kept."""

from __future__ import annotations

import re
import textwrap

from attnlab.cli.docstrings import Doc

_KEEP = re.compile(r"(``.+?``|`.+?`|\$\$.+?\$\$|\$[^$]+?\$)", re.DOTALL)
_MARKUP = re.compile(r"([\\*_\[\]|#])")


def escape(text: str) -> str:
    """Prose of a docstring as Markdown; two backquotes become one."""
    pieces = []
    for index, piece in enumerate(_KEEP.split(text)):
        if piece.startswith("`"):
            pieces.append(f"`{piece.strip('`')}`")
        elif index % 2:
            pieces.append(piece)
        else:
            pieces.append(_MARKUP.sub(r"\\\1", piece).replace("<", "&lt;").replace(">", "&gt;"))
    return "".join(pieces)


def sentence(text: str) -> str:
    """The same with a capital letter at its start, unless that is code or an equation."""
    return text[:1].upper() + text[1:]


def cell(text: str) -> str:
    """Prose as a cell of a table: on one line, without a bar even in code."""
    return escape(" ".join(text.split())).replace("\n", " ")


def paragraph(text: str) -> str:
    """A paragraph of a docstring: an indented one is code."""
    if all(line.startswith("    ") for line in text.splitlines()):
        return f"```python\n{textwrap.dedent(text)}\n```"
    return escape(text)


def body(doc: Doc) -> str:
    """Summary and body."""
    return "\n\n".join(paragraph(text) for text in (doc.summary, *doc.body))


def code(text: str) -> str:
    """Text as inline code; in a table's cell too, where a bar inside code is no border."""
    return f"`{text}`" if text else ""
