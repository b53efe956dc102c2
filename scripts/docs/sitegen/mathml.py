"""Equations: LaTeX between dollar signs becomes MathML, which browsers show by themselves, without a script or a download."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from latex2mathml.converter import convert

_MATHML = "http://www.w3.org/1998/Math/MathML"
_UNDER = {"msub": "munder", "msup": "mover", "msubsup": "munderover"}
_LIMITS = set("∑∏")
# Code first: a dollar sign in it is no equation.
_PIECES = re.compile(r"(^```.*?^```|`+[^`]+?`+)|\$\$(.+?)\$\$|(?<![\\\w])\$([^$\n]+?(?:\n[^$\n]+?)*)\$", re.DOTALL | re.MULTILINE)
_WIDE = re.compile(r"(\\qquad|\\quad)(?![A-Za-z])")
_OPEN, _CLOSE = re.compile(r"(?<!\\)\{|\\left\b"), re.compile(r"(?<!\\)\}|\\right\b")
_TOKEN = "MathMark{:05d}End"

ElementTree.register_namespace("", _MATHML)


def to_mathml(latex: str, *, display: bool) -> str:
    """One equation as a ``<math>`` element, which carries its source as ``alttext``."""
    root = ElementTree.fromstring(convert(" ".join(latex.split()), display="block" if display else "inline"))
    for node in root.iter():
        name = node.tag.rpartition("}")[2]
        if display and name in _UNDER and len(node) and (node[0].text or "") in _LIMITS:
            node.tag = f"{{{_MATHML}}}{_UNDER[name]}"
        if name == "mtext" and node.text:
            node.text = node.text.replace("\\_", "_")
    root.set("alttext", " ".join(latex.split()))
    return ElementTree.tostring(root, encoding="unicode")


def split(latex: str) -> list[str]:
    """A displayed line of several equations as these equations: cut at wide spaces that stand in no braces or brackets."""
    parts, depth = [""], 0
    for token in _WIDE.split(latex):
        if token in ("\\qquad", "\\quad") and depth == 0:
            parts.append("")
            continue
        depth += len(_OPEN.findall(token)) - len(_CLOSE.findall(token))
        parts[-1] += token
    return [part.strip() for part in parts if part.strip()]


def hide(markdown: str) -> tuple[str, dict[str, str]]:
    """Markdown with a plain word in the place of each equation, and the MathML of each of these words."""
    found: dict[str, str] = {}

    def mark(latex: str, display: bool) -> str:
        word = _TOKEN.format(len(found))
        found[word] = "".join(to_mathml(part, display=display) for part in (split(latex) if display else [latex]))
        return f"\n\n{word}\n\n" if display else word

    def replace(match: re.Match[str]) -> str:
        code, display, inline = match.groups()
        if code is not None:
            return code
        return mark(display, True) if display is not None else mark(inline, False)

    return _PIECES.sub(replace, markdown), found


def reveal(html: str, found: dict[str, str]) -> str:
    """HTML with the equations in the place of their words.

    A displayed one scrolls sideways where it is too wide; the punctuation behind an inline one stays on its line.
    """
    for word, mathml in found.items():
        html = html.replace(f"<p>{word}</p>", f'<div class="equation">{mathml}</div>')
        html = re.sub(rf"{word}([,.;:)]+)", rf'<span class="nobr">{word}\1</span>', html)
        html = html.replace(word, mathml)
    return html
